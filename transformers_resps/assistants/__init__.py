"""Models of Transformers that draft: Gemma 4's assistants, and any small causal model."""

from .causal import CausalDrafter
from .gemma import GemmaAssistant


__all__ = ["CausalDrafter", "GemmaAssistant"]
