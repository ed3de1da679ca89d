"""What compiled code takes for granted of a module, so that a change is noticed."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


_SAMPLED = 4  # values of each tensor: a write through `.data` leaves no other trace


class WeightFingerprint:
    """Places, versions and some values of a module's parameters and buffers, and its mode.

    Compiled code holds weights as constants or by their addresses. `load_state_dict`, `.to(...)`, a merged adapter or
    a switch to training would be ignored.

    Args:
        module: whose code is compiled.
        setting: anything else that the code depends on.
    """

    def __init__(self, module: nn.Module, *setting: Any) -> None:
        tensors = list(chain(module.parameters(), module.buffers()))
        self._marks = [_mark(tensor) for tensor in tensors]
        self._values = _sampled(tensors)
        self._setting = (module.training, type(module), *setting)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightFingerprint):
            return NotImplemented
        mine, theirs = (one._marks + [one._setting] for one in (self, other))
        return mine == theirs and torch.equal(self._values, other._values)

    __hash__ = None  # type: ignore[assignment]  # weights change


def _mark(tensor: Tensor) -> Any:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.dtype, tensor.device


def _sampled(tensors: list[Tensor]) -> Tensor:
    """The first values of every tensor in the CPU's memory; of others they would have to be waited for."""
    rows = [_first_row(tensor.detach()) for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()]
    return torch.cat([row[:_SAMPLED].to(torch.float64) for row in rows]).nan_to_num() if rows else torch.empty(0)


def _first_row(tensor: Tensor) -> Tensor:
    return tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() else tensor[None]
