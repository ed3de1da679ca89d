"""A run of a training command: how it is called, where it resumes, how long it took."""
