"""Models of Transformers that draft: Gemma 4's assistants, and any small causal model."""

from .gemma import GemmaAssistant


__all__ = ["GemmaAssistant"]
