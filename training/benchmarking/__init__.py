"""`training/benchmark.py`: what it adds to `resps bench`, for the figures that we publish."""
