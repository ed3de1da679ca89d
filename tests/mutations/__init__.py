"""Bugs that the tests must notice. `python -m tests.mutations` plants them one at a time."""
