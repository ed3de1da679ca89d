"""A tiny target, a head that guesses, and a prompt."""

from tests.lossless.conftest import head, prompt, target


__all__ = ["head", "prompt", "target"]
