"""EAGLE-3 draft heads and block heads. Importing this package registers both with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel

from .block_head import BlockHead
from .config import BlockHeadConfig, DraftHeadConfig
from .identity import parameter_fingerprint
from .model import Attend, BoundHead, DraftHead, Rope, pair_identity


__all__ = [
    "Attend",
    "BlockHead",
    "BlockHeadConfig",
    "BoundHead",
    "DraftHead",
    "DraftHeadConfig",
    "Rope",
    "pair_identity",
    "parameter_fingerprint",
]

AutoConfig.register(DraftHeadConfig.model_type, DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)
AutoConfig.register(BlockHeadConfig.model_type, BlockHeadConfig, exist_ok=True)
AutoModel.register(BlockHeadConfig, BlockHead, exist_ok=True)
