"""Drafters of Transformers' own layers, which come with a checkpoint or are models themselves."""

from .mtp import MtpHead
from .mtp_layouts import MtpConfig


__all__ = ["MtpConfig", "MtpHead"]
