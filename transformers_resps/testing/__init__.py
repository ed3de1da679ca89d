"""The lossless check: compare the output with a head and a policy to the model's own."""

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
