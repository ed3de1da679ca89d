"""What the command `resps` runs."""
