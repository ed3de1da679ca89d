"""The EAGLE-3 draft head."""

from .bound import BoundHead
from .cache import HeadCache
from .configuration import DraftHeadConfig
from .layer import Attend
from .modeling import DraftHead
from .pairing import head_fingerprint, pair_identity


__all__ = ["Attend", "BoundHead", "DraftHead", "DraftHeadConfig", "HeadCache", "head_fingerprint", "pair_identity"]
