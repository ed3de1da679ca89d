"""The lossless check: where two outputs differ, whether rounding explains it, and a test of the whole engine."""

from .divergence import MAX_SPACINGS, Divergence, explain_divergence, spacing_at
from .kit import assert_lossless
from .report import LosslessReport, NotLosslessError


__all__ = [
    "MAX_SPACINGS",
    "Divergence",
    "LosslessReport",
    "NotLosslessError",
    "assert_lossless",
    "explain_divergence",
    "spacing_at",
]
