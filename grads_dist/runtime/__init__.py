"""Where the program runs: launcher, ranks, run directory, logs."""
