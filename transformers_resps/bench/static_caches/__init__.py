"""What static caches and compiled targets gain: plain and with trees, over the same prompts, in turn."""
