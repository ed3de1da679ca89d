"""The lossless check: compares output with speculative decoding to output of plain decoding."""

from .divergence import Divergence, explain_divergence
from .lossless import LosslessReport, NotLosslessError, StoppedCheck, assert_lossless


__all__ = [
    "Divergence",
    "LosslessReport",
    "NotLosslessError",
    "StoppedCheck",
    "assert_lossless",
    "explain_divergence",
]
