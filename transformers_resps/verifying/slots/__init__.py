"""Texts in static buffers, compiled or eager steps over them, and a reader of prompts."""
