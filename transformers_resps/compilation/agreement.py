"""Compiled code must give what the eager code gives."""

import torch
from torch import Tensor


# Share of the largest value by which compiled and eager code may differ.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Say how far compiled values are from the eager ones; `None` where rounding explains it.

    Args:
        found: by compiled code, of any shape.
        expected: by eager code.
        dtype: of the weights that both multiply.
    """
    error, scale = (float(part.abs().max()) for part in (found - expected, expected))
    if error <= _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) * max(scale, 1.0):
        return None
    return f"differ by {error:.3g} from the eager ones, the largest of which is {scale:.3g}"
