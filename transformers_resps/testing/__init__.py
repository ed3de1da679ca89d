"""The lossless check: compares output with speculative decoding to output of plain decoding."""

from .divergence import MAX_SPACINGS, Divergence, explain_divergence, spacing_at
from .lossless import LosslessReport, NotLosslessError, assert_lossless


__all__ = [
    "MAX_SPACINGS",
    "Divergence",
    "LosslessReport",
    "NotLosslessError",
    "assert_lossless",
    "explain_divergence",
    "spacing_at",
]
