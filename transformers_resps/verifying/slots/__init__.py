"""Texts in static buffers, steps over them by compiled code or eager, and a reader of prompts."""
