"""Where it runs: cluster launchers. Single-node runs need only `foundation train` or `torchrun`."""
