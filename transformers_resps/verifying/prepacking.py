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

from ..compilation.pages import collapse


Module = TypeVar("Module", bound=nn.Module)

# The layout is chosen for a number of rows; this one was no slower than any other from 1 to 256.
_ROWS = 8


class PackedWeight:
    """The packed copy of one weight, made when it is asked for and anew when the weight has changed."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._place = self._version = 0
        self._blocks: Tensor | None = None

    def __reduce__(self) -> tuple[type["PackedWeight"], tuple[()]]:
        return PackedWeight, ()  # oneDNN tensors cannot be pickled or copied: a copy is packed anew

    def blocks(self, weight: Tensor) -> Tensor | None:
        """`weight` in oneDNN's layout; `None` where it cannot be packed."""
        if weight is not self._weight or weight.data_ptr() != self._place or weight._version != self._version:
            return self._pack(weight)
        return self._blocks

    def _pack(self, weight: Tensor) -> Tensor | None:
        if not _can_prepack(weight):
            self._weight = self._blocks = None
            return None
        blocks = self._blocks = _reordered(weight)
        self._place, self._version = weight.data_ptr(), weight._version
        self._weight = weight  # last: other threads may read meanwhile
        return blocks


class PrepackedLinear(nn.Linear):
    """A linear layer with a second, packed copy of its weight, used where no gradient is computed.

    Parameters, names and what is saved stay those of `nn.Linear`.
    """

    packed: PackedWeight

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
        blocks = self.packed.blocks(weight)
        if blocks is None:
            return super().forward(input)
        return _multiplied(input, blocks, self._parameters["bias"])


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def _multiplied(input: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, blocks, bias, "none", [], "")


class PackedWeights:
    """The packed weights of one module that itself stays as it is, kept from one `view` to the next."""

    def __init__(self) -> None:
        self._weights: dict[str, PackedWeight] = {}

    def __reduce__(self) -> tuple[type["PackedWeights"], tuple[()]]:
        return PackedWeights, ()

    def view(self, module: Module) -> Module:
        """Make a second `module` that multiplies by packed weights, and shares parameters, buffers and hooks.

        It is a view of the layers that the module has now; `module` itself where none can be packed.
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
    """A module with the state of `module`, made as unpickling would make it."""
    twin = module_class.__new__(module_class)
    twin.__setstate__(vars(module) | changed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return twin


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
    blocks = _reordered(weight)

    def multiplied(input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler packs weights itself
            return F.linear(input, weight, bias)
        return _multiplied(input, blocks, bias)

    return multiplied


def prepack(module: Module) -> Module:
    """Prepack the weights of a module's linear layers, so that they multiply few rows faster.

    Speeds up plain decoding and trees, on a CPU in float32, and in bfloat16 if the CPU multiplies it; elsewhere the
    layers work as before. The packed copies take as much memory as the weights; Linux keeps them in huge pages where
    it can. Results differ by rounding at most. Call it again after weights were changed through `.data`, as PEFT's
    merge does: such a change cannot be noticed.

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
    packed = list[Tensor]()
    for layer in module.modules():
        if type(layer) is nn.Linear:
            # A new object in its parent would lack what others have put on this one: hooks and their handles, the
            # `forward` of accelerate's offloading, references in lists. `torch.nn.utils.parametrize` does it so, too.
            layer.__class__ = PrepackedLinear
        if type(layer) is PrepackedLinear:
            layer.packed = PackedWeight()  # without what was packed before
            weight = layer._parameters.get("weight")
            blocks = None if weight is None else layer.packed.blocks(weight)
            packed += [] if blocks is None else [blocks]
    collapse(packed)  # together: alone, most weights of a small model fill no huge page
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
            del layer.packed
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
