"""Tensors that are kept from one call to the next."""

import torch
from torch import Tensor


def is_of_this_mode(tensor: Tensor) -> bool:
    """Whether it was made in inference mode, as this call is, or outside, likewise.

    Outside, PyTorch refuses to write what was made in inference mode; and it compiles anew for tensors of the other
    kind.
    """
    return tensor.is_inference() == torch.is_inference_mode_enabled()
