"""Published EAGLE-3 checkpoints -> our canonical head, and back."""

from .checkpoint import Checkpoint, given_checkpoint, read_checkpoint
from .conventions import refuse_rope
from .exporting import export_head
from .importing import canonical_head
from .keywords import check_fields, check_overrides, split_keywords
from .names import refuse_inexact


__all__ = [
    "Checkpoint",
    "canonical_head",
    "check_fields",
    "check_overrides",
    "export_head",
    "given_checkpoint",
    "read_checkpoint",
    "refuse_inexact",
    "refuse_rope",
    "split_keywords",
]
