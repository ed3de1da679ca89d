"""The proof kit: where two answers part, whether rounding explains it, and whether all that is emitted is lossless."""

from .divergence import MOST_SPACINGS, Divergence, explain_divergence, spacing_at
from .kit import assert_lossless
from .report import LosslessReport, NotLosslessError


__all__ = [
    "MOST_SPACINGS",
    "Divergence",
    "LosslessReport",
    "NotLosslessError",
    "assert_lossless",
    "explain_divergence",
    "spacing_at",
]
