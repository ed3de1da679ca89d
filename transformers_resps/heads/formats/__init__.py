"""Published EAGLE-3 checkpoints -> our canonical head, and back."""
