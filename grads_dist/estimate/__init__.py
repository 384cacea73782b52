"""Says what a probe will cost before any of it is spent."""
