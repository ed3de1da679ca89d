"""Compares methods in turn, prompt by prompt, in one process: total tokens over total seconds."""
