"""The exact mode whole: its attention, its experts, what kernels it needs, and its verifier."""
