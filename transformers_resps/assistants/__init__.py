"""Drafters that run layers or models of Transformers: MTP layers, Gemma 4's assistants, and small causal models."""

from .auto import AutoDraftHead, load_drafter, load_head, source_of
from .causal import CausalDrafter
from .gemma import GemmaAssistant
from .mtp import MtpHead
from .mtp_layouts import MtpConfig
from .self_draft import SelfDraft


__all__ = [
    "AutoDraftHead",
    "CausalDrafter",
    "GemmaAssistant",
    "MtpConfig",
    "MtpHead",
    "SelfDraft",
    "load_drafter",
    "load_head",
    "source_of",
]
