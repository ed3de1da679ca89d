"""Published EAGLE-3 checkpoints -> our canonical head, and back."""

from .checkpoint import Checkpoint, given_checkpoint, read_checkpoint
from .conventions import check_rope
from .exporting import export_head
from .importing import canonical_head
from .tensor_names import check_exact
from .validation import check_fields, check_overrides, split_keywords


__all__ = [
    "Checkpoint",
    "canonical_head",
    "check_fields",
    "check_overrides",
    "export_head",
    "given_checkpoint",
    "read_checkpoint",
    "check_exact",
    "check_rope",
    "split_keywords",
]
