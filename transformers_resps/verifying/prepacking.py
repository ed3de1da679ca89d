"""Linear layers with prepacked weights, which multiply few rows fast, such as the nodes of a tree.

On a CPU `torch.nn.Linear` reorders its weights at every call, so in float32 the 2 to 64 rows of a tree take two to
four times as long as one row (SmolLM2's forward on AVX2: one token 57 ms, eight 99 ms; packed 45 and 66 ms).
A packed layer keeps its weights in oneDNN's blocked layout. On AVX2 a row's result then does not depend on the number
of rows; on AVX-512 this holds only for some sizes of layers. On CPUs that multiply bfloat16 (AVX-512 and later),
packed bfloat16 layers are faster for any number of rows (SmolLM2 on Zen 4: 41 and 51 ms; packed 34 and 35 ms).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compilation.pages import collapse, release


logger = logging.getLogger(f"transformers.{__name__}")

Module = TypeVar("Module", bound=nn.Module)

# oneDNN chooses the layout for this number of rows; no other number made 1 to 256 rows faster.
_ROWS = 8


class PackedWeight:
    """Keeps the packed copy of one weight, and makes a new copy when the weight has changed."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._place = self._version = 0
        self._blocks: Tensor | None = None

    def __reduce__(self) -> tuple[type["PackedWeight"], tuple[()]]:
        return PackedWeight, ()  # oneDNN tensors cannot be pickled or copied: a copy is packed anew

    def blocks(self, weight: Tensor) -> Tensor | None:
        """Return `weight` in oneDNN's layout, or `None` if it cannot be packed."""
        if weight is not self._weight or weight.data_ptr() != self._place or weight._version != self._version:
            return self._pack(weight)
        return self._blocks

    def _pack(self, weight: Tensor) -> Tensor | None:
        if not _can_prepack(weight):
            self._weight = self._blocks = None
            return None
        blocks = self._blocks = _reordered(weight)
        self._place, self._version = weight.data_ptr(), weight._version
        self._weight = weight  # last: another thread may call `blocks` meanwhile
        return blocks


class PrepackedLinear(nn.Linear):
    """A linear layer with a second, packed copy of its weight for passes without gradients.

    Parameters, their names and the state dict stay those of `nn.Linear`.
    """

    packed: PackedWeight

    def forward(self, input: Tensor) -> Tensor:
        """Compute the same as `nn.Linear`, up to rounding."""
        weight = self._parameters.get("weight")  # ten times as fast as `self.weight`; `None` if parametrised
        if (
            weight is None
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or input.dtype is not weight.dtype
        ):
            return super().forward(input)
        blocks = self.packed.blocks(weight)
        if blocks is None:
            return super().forward(input)
        return _multiplied(input, blocks, self._parameters["bias"])


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def _multiplied(input: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, blocks, bias, "none", [], "")


class PackedWeights:
    """Keeps packed copies of a module's weights, so that the next `view` reuses them. The module is not changed."""

    def __init__(self) -> None:
        self._weights: dict[str, PackedWeight] = {}

    def __reduce__(self) -> tuple[type["PackedWeights"], tuple[()]]:
        return PackedWeights, ()

    def view(self, module: Module) -> Module:
        """Make a copy of `module` that multiplies by packed weights, and shares its parameters, buffers and hooks.

        Later changes of `module`'s layers do not reach the copy. Returns `module` itself if no weight can be packed.
        """
        kept: dict[str, PackedWeight] = {}
        twin = self._view(module, "", kept)
        self._weights = kept
        return twin

    def _view(self, module: Module, name: str, kept: dict[str, PackedWeight]) -> Module:
        if type(module) is nn.Linear and _can_prepack(cast(Tensor, module.weight)):
            kept[name] = self._weights.get(name) or PackedWeight()
            return cast(Module, _twin(module, PrepackedLinear, packed=kept[name]))
        changed = {
            child: twin
            for child, part in module.named_children()
            if (twin := self._view(part, f"{name}.{child}", kept)) is not part
        }
        return _twin(module, type(module), _modules=vars(module)["_modules"] | changed) if changed else module


def _twin(module: nn.Module, module_class: type[Module], **changed: Any) -> Module:
    """Make a module of class `module_class` with the attributes of `module`, except those given in `changed`."""
    twin = module_class.__new__(module_class)
    twin.__setstate__(vars(module) | changed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return twin


def packed_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Make a function `[..., in]` -> `[..., out]` that multiplies by `weight` `[out, in]`, packed if that is faster.

    The function computes no gradients, and the weight must not change while the function is used. `bias` is `[out]`;
    bias and input have the weight's dtype.
    """
    if not _can_prepack(weight):
        return lambda input: F.linear(input, weight, bias)
    blocks = _reordered(weight)

    def multiplied(input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler packs weights itself
            return F.linear(input, weight, bias)
        return _multiplied(input, blocks, bias)

    return multiplied


def prepack(module: Module) -> Module:
    """Prepack the weights of a module's linear layers, so that they multiply few rows faster.

    Speeds up plain decoding and trees on CPUs, in float32, and in bfloat16 if the CPU multiplies it; elsewhere layers
    work as before. Packed copies take as much memory as the weights. Weights that are memory-mapped from the
    checkpoint's file are removed from memory, and read again when needed. Results differ by rounding at most. Changes
    of weights through `.data`, as in PEFT's merge, are not noticed: call `prepack` again after them.

    Returns `module`, which is changed in place: layers that are exactly `nn.Linear` become `PrepackedLinear`, with the
    same parameters and names. Quantized layers are not changed, and a warning names one of them. Raises a `ValueError`
    if `module` is no `nn.Module`, and changes nothing if packing fails.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"`prepack` needs a model, a head or another `nn.Module`, got {module!r:.80}.")
    packed, left = dict[nn.Module, PackedWeight](), dict[str, str]()
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Linear) and weight is not None and not _is_plain(weight):
            left.setdefault(type(weight).__name__, name)
        elif type(layer) in (nn.Linear, PrepackedLinear):
            packed[layer] = PackedWeight()  # a new one, since `.data` may have changed
    blocks = [
        (own.blocks(weight), weight)
        for layer, own in packed.items()
        if (weight := layer._parameters.get("weight")) is not None
    ]
    for layer, own in packed.items():
        # A new object would lack what others have put on this one: hooks and their handles, the `forward` of
        # accelerate's offloading, references in lists. `torch.nn.utils.parametrize` swaps the class as well.
        layer.__class__ = PrepackedLinear
        layer.packed = own  # type: ignore[assignment]  # its new class has this attribute
    # Together, since most weights of a small model fill no page alone.
    collapse(own for own, _ in blocks if own is not None)
    release(weight for own, weight in blocks if own is not None)
    for kind, name in left.items():
        logger.warning(
            f"`prepack` leaves `{name}` and its like as they are: oneDNN packs no {kind}. Compiled steps may read it: "
            "pass `compile=True`."
        )
    return module


def unprepack(module: Module) -> Module:
    """Undo `prepack` in place, free the memory of the packed copies, and return `module`."""
    for layer in module.modules():
        if type(layer) is PrepackedLinear:
            del layer.packed
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # back to its own class
    return module


def is_prepacked(module: nn.Module) -> bool:
    """Whether any layer of `module` multiplies by packed weights."""
    return any(type(layer) is PrepackedLinear and _can_prepack(layer.weight) for layer in module.modules())


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; without them oneDNN uses slow reference code."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor or parameter; weights of other classes may be quantized or sharded."""
    return type(weight) in (Tensor, nn.Parameter)


def _can_prepack(weight: Tensor) -> bool:
    """Whether a weight can be packed; not an inference tensor: it has no version, so changes would go unnoticed."""
    return (
        _is_plain(weight)
        and (weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and _multiplies_bfloat16()))
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
    )
