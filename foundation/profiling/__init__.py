"""Where the time of an update goes: measured on a few updates of a real run."""
