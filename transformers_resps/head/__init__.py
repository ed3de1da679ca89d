"""The EAGLE-3 draft head."""

from .bound import BoundHead
from .cache import HeadCache
from .configuration import DraftHeadConfig
from .modeling import DraftHead


__all__ = ["BoundHead", "DraftHead", "DraftHeadConfig", "HeadCache"]
