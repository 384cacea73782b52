"""Statistics of per-sample gradients inside someone else's training loop."""
