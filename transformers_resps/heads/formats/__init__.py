"""Convert published checkpoints to our canonical heads, and back."""
