"""Measures static caches and compiled targets: plain and with trees, over the same prompts, in turn."""
