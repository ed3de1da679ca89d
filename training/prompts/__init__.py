"""The prompts of a training command: loaded and split, or answered by the target."""
