"""Published EAGLE-3 checkpoints -> our canonical head, and back."""

from .reading import PUBLISHED_ONLY, canonical_head, read_checkpoint
from .tensor_names import check_exact
from .writing import export_head


__all__ = ["PUBLISHED_ONLY", "canonical_head", "check_exact", "export_head", "read_checkpoint"]
