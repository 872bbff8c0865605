"""What a run folder says of its run: facts, and tables of them for the terminal and the report. Nothing is changed."""
