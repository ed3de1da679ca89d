"""Linear layers with prepacked weights, fast for few rows, as in a tree's forward or a head's level.

On a CPU `torch.nn.Linear` lays its weights out again at every call. In float32, whose library is made for one row or
for hundreds, the 2 to 64 rows of a tree then cost two to four times one row (measured on AVX2: SmolLM2's forward
takes 57 ms over one token and 99 ms over eight; packed 45 and 66 ms). oneDNN keeps weights in its own blocked layout
instead, and a row's result hardly depends on how many are multiplied with it: on AVX2 never, on AVX-512 in some sizes
(docs/lossless.md). In bfloat16, on CPUs that multiply it (AVX-512 and later), packed layers are faster for any number
of rows (SmolLM2's forward on Zen 4: 41 ms over one token and 51 ms over eight; packed 34 and 35 ms).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Module = TypeVar("Module", bound=nn.Module)

# The layout is chosen for a number of rows; this one was no slower than any other from 1 to 256.
_ROWS = 8


class _PrepackedWeight:
    """A weight in oneDNN's layout, as long as it does not change."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._place, self._version = weight, weight.data_ptr(), weight._version
        self._blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` is the one that was packed, unchanged."""
        same = weight is self._weight and weight.data_ptr() == self._place
        return same and weight._version == self._version

    def __call__(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, self._blocks, bias, "none", [], ""))


class PrepackedLinear(nn.Linear):
    """A linear layer with a second, packed copy of its weight, used where no gradient is computed.

    Parameters, names and what is saved stay those of `nn.Linear`.
    """

    _prepacked: _PrepackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, up to rounding."""
        weight = self._parameters.get("weight")  # ten times as fast as `self.weight`; none if parametrised
        if (
            weight is None
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or input.dtype is not weight.dtype
        ):
            return super().forward(input)
        prepacked = self._prepacked
        if prepacked is None or not prepacked.is_of(weight):
            prepacked = self._prepacked = _PrepackedWeight(weight) if _can_prepack(weight) else None
        if prepacked is None:
            return super().forward(input)
        return prepacked(input, self._parameters["bias"])

    def forget(self) -> None:
        """Free the packed copy; it is made anew where it is needed."""
        self.__dict__.pop("_prepacked", None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which is made anew where it is needed: oneDNN tensors cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepacked"}


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Pack a weight `[n, m]` for several products without gradients, where that is faster.

    Args:
        weight: must not change while the result is used.
        bias: `[n]`, in the weight's dtype.

    Returns:
        `[..., m]` -> `[..., n]`, in the weight's dtype.
    """
    if not _can_prepack(weight):
        return lambda input: F.linear(input, weight, bias)
    packed = _PrepackedWeight(weight)
    return lambda input: packed(input, bias)


def prepack(module: Module) -> Module:
    """Prepack the weights of a module's linear layers, so that they multiply few rows faster.

    Speeds up plain decoding and trees, on a CPU in float32, and in bfloat16 if the CPU multiplies it; elsewhere the
    layers work as before. The packed copies take as much memory as the weights. Results differ by rounding at most.
    Call it again after weights were changed through `.data`, as PEFT's merge does: such a change cannot be noticed.

    Args:
        module: a model, a head, or any other module; changed in place. Only layers that are exactly `nn.Linear` are
            packed; parameters and their names stay.

    Returns:
        `module`, its linear layers now `PrepackedLinear`.

    Raises:
        ValueError: `module` is no `nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"`prepack` needs a model, a head or another `nn.Module`, got {module!r:.80}.")
    for layer in module.modules():
        if type(layer) is nn.Linear:
            # A new object in its parent would lack what others have put on this one: hooks and their handles, the
            # `forward` of accelerate's offloading, references in lists. `torch.nn.utils.parametrize` does it so, too.
            layer.__class__ = PrepackedLinear
        elif type(layer) is PrepackedLinear:
            layer.forget()
    return module


def unprepack(module: Module) -> Module:
    """Undo `prepack`, and free the memory of the packed copies.

    Args:
        module: what `prepack` was given; changed in place.

    Returns:
        `module`, its linear layers now `nn.Linear`.
    """
    for layer in module.modules():
        if type(layer) is PrepackedLinear:
            layer.forget()
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # back to its own class
    return module


def is_prepacked(module: nn.Module) -> bool:
    """Whether any layer of `module` multiplies by packed weights."""
    return any(type(layer) is PrepackedLinear and _can_prepack(layer.weight) for layer in module.modules())


@cache
def _multiplies_bfloat16() -> bool:
    """Without such units oneDNN would compute by a slow reference path."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_prepack(weight: Tensor) -> bool:
    """An inference tensor does not tell when it changes, so its packed copy could grow stale."""
    return (
        (weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _multiplies_bfloat16()))
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
    )
