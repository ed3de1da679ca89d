"""Models of Transformers that draft: MTP layers of a checkpoint, Gemma 4's assistants, and any small causal model."""

from .auto import AutoDraftHead, load_drafter, load_head, source_of
from .causal import CausalDrafter
from .gemma import GemmaAssistant
from .mtp import MtpHead
from .mtp_layouts import MtpConfig


__all__ = [
    "AutoDraftHead",
    "CausalDrafter",
    "GemmaAssistant",
    "MtpConfig",
    "MtpHead",
    "load_drafter",
    "load_head",
    "source_of",
]
