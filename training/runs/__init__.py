"""A training command: what it says first, how it is called, and how it ends."""
