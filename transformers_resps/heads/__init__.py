"""The EAGLE-3 draft head."""

from .cache import HeadCache
from .config import DraftHeadConfig
from .identity import pair_identity, parameter_fingerprint
from .model import Attend, BoundHead, DraftHead, Rope, RopeWindow


__all__ = [
    "Attend",
    "BoundHead",
    "DraftHead",
    "DraftHeadConfig",
    "HeadCache",
    "Rope",
    "RopeWindow",
    "pair_identity",
    "parameter_fingerprint",
]
