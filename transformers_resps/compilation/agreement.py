"""Compiled code must give what the eager code gives."""

import torch
from torch import Tensor


# Share by which compiled and eager code may differ. SmolLM2's logits in bfloat16: 0.02 to 0.06. One matrix of another
# layer makes it 0.16, a token hidden from the newest 0.19; positions off by one, 0.10, look almost like rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Say how far compiled values are from the eager ones; `None` where rounding explains it.

    All values count together: in low precision a single one may be far off.

    Args:
        found: by compiled code, of any shape.
        expected: by eager code.
        dtype: of the weights that both multiply.
    """
    difference, scale = (float(part.float().norm()) for part in (found - expected, expected))
    if difference <= _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) * max(scale, 1.0):
        return None
    return f"differ from the eager ones by {difference / max(scale, 1.0):.2g} of their norm"
