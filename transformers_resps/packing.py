"""Linear layers laid out for few rows: what a tree's forward and a head's level multiply by.

On a processor `torch.nn.Linear` lays its weights out anew at every call. In float32, where its library is made for
one row or for hundreds, the 2 to 64 rows of a tree then cost two to four times one row (measured on AVX2: SmolLM2's
forward over 8 tokens 99 ms against 57 for one; packed 66 against 45). oneDNN keeps weights in its own blocked layout
instead, and a row's result hardly depends on how many are multiplied with it: on AVX2 never, on AVX-512 in some sizes
(docs/lossless.md). In bfloat16, on processors that multiply it (AVX-512 and later), packed layers are quicker for any
number of rows (SmolLM2's forward on Zen 4: over one token 34 ms against 41, over eight 35 against 51).

Knows `nn.Linear` only: nothing of heads, targets or trees.
"""

from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn


Module = TypeVar("Module", bound=nn.Module)

# The layout is chosen for a number of rows; this one was no slower than any other from 1 to 256.
_ROWS = 8


class _Packed:
    """A weight in oneDNN's layout, as long as it does not change."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._place, self._version = weight, weight.data_ptr(), weight._version
        self.blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` is the one that was packed, unchanged."""
        same = weight is self._weight and weight.data_ptr() == self._place
        return same and weight._version == self._version


class PackedLinear(nn.Linear):
    """A linear layer with a second, packed copy of its weight, used wherever no gradient is wanted.

    Parameters, names and what is saved stay those of `nn.Linear`.
    """

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
        kept: _Packed | None = self.__dict__.get("_kept")
        if kept is None or not kept.is_of(weight):
            kept = self.__dict__["_kept"] = _Packed(weight) if _can_pack(weight) else None
        if kept is None:
            return super().forward(input)
        bias = self._parameters["bias"]
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(input, kept.blocks, bias, "none", [], ""))

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which is made anew where it is needed: oneDNN tensors cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def pack(module: Module) -> Module:
    """Let the linear layers of `module` multiply few rows quickly. Same object, same parameters.

    Plain decoding and trees both gain, on a processor in float32, or in bfloat16 where it has units for that;
    elsewhere the layers work as before. It takes the size of their weights in memory once more. Results differ from
    unpacked layers by rounding, if at all. Call it again after weights were written through `.data`, as PEFT's merge
    does: nothing else tells that they have changed.

    Args:
        module: a model, a head, or any other module. Layers that are not exactly `nn.Linear` are left alone.

    Returns:
        `module`, its linear layers now `PackedLinear`.

    Raises:
        ValueError: it is no module.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"Got {module!r:.80}, but `pack` changes the layers of a module. Pass a model or a head.")
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
        elif type(layer) is PackedLinear:
            layer.__dict__.pop("_kept", None)
    return module


def unpack(module: Module) -> Module:
    """Undo `pack`, and give the memory back."""
    for layer in module.modules():
        if type(layer) is PackedLinear:
            layer.__dict__.pop("_kept", None)
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # back to its own class
    return module


def is_packed(module: nn.Module) -> bool:
    """Whether any layer of `module` multiplies by packed weights."""
    return any(type(layer) is PackedLinear and _can_pack(layer.weight) for layer in module.modules())


@cache
def _multiplies_bfloat16() -> bool:
    """Without such units oneDNN would compute by a slow reference path."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _can_pack(weight: Tensor) -> bool:
    """An inference tensor does not tell when it changes, so its packed copy could grow stale."""
    return (
        (weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _multiplies_bfloat16()))
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
    )
