"""Published EAGLE-3 checkpoints -> our canonical head, and back."""

from .checkpoint import read_checkpoint
from .exporting import export_head
from .importing import PUBLISHED_ONLY, canonical_head
from .tensor_names import check_exact


__all__ = ["PUBLISHED_ONLY", "canonical_head", "check_exact", "export_head", "read_checkpoint"]
