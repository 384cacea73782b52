"""Per-sample gradient statistics of whatever backward pass runs."""
