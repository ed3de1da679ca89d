"""The EAGLE-3 draft head."""

from .bound import BoundHead
from .cache import HeadCache
from .configuration import DraftHeadConfig
from .fingerprint import pair_identity, parameter_fingerprint
from .layer import Attend, Rope
from .modeling import DraftHead
from .rope_window import RopeWindow


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
