"""The prompts of a training command: read, answered by the target, recorded with what its drafters propose."""
