"""Picks the best share of a fine-tuning corpus from per-sample gradients seen under DeepSpeed ZeRO."""
