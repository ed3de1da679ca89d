"""A device that no machine has: tensors in CPU memory that report it, so that code takes the way of an accelerator.

While a `Meter` is on, it hears of every operation on them, and of every time the host has to wait for the device.
"""

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
torch.get_device_module(DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]  # autocast asks for it

# What only allocates, or tells something of a tensor that the host knows.
_LAUNCH_NOTHING = {"detach", "alias", "lift_fresh", "_unsafe_view", "is_nonzero", "sym_size", "_local_scalar_dense"}
_LAUNCH_NOTHING |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
# The size of their result stands in the device's memory.
_SIZE_UNKNOWN = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"}
_SIZE_UNKNOWN |= {"repeat_interleave"}
_LOG2_E = 1.4426950408889634
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Meter(Protocol):
    """Hears what an accelerator would be asked for."""

    def launched(self, name: str, *, is_view: bool) -> None:
        """An operation on the device."""

    def waited(self, kind: str) -> None:
        """The host waited for the device, or copied to it from memory that is not pinned."""


class PretendTensor(Tensor):
    """Stands for `held`, a tensor in CPU memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: PretendTensor = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **sizes)  # type: ignore
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(operation, args, kwargs or {}, None)


def on_device(value: Tensor) -> Tensor:
    """The tensor on the device."""
    return value if isinstance(value, PretendTensor) else PretendTensor(value.detach())


def held(value: Any) -> Any:
    """What a tensor of the device stands for, in lists and tuples as well; anything else as it is."""
    if type(value) in (list, tuple):
        return type(value)(map(held, value))
    return value.held if isinstance(value, PretendTensor) else value


def move(module: nn.Module) -> nn.Module:
    """Put all parameters and buffers of a module on the device, in place; what parts share stays shared."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, PretendTensor):
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(on_device(parameter), requires_grad=False)
                part._parameters[name] = moved[parameter]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else on_device(buffer)
    return module


def is_there(device: Any) -> bool:
    """Whether a `device` argument names the device."""
    return device is not None and torch.device(device).type == DEVICE.type


def run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meter: Meter | None) -> Any:
    """Run one operation in CPU memory and tell the meter of it."""
    values = [*args, *kwargs.values()]
    flat = [part for value in values for part in (value if type(value) in (list, tuple) else (value,))]
    there = [value for value in flat if isinstance(value, PretendTensor)]
    name = _name(operation)
    stays = is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    if name == "copy_":
        stays = isinstance(args[0], PretendTensor)
    if meter is not None and (there or stays):
        meter.launched(name, is_view=name in _LAUNCH_NOTHING or _is_view(operation))
        reason = _why_it_waits(name, args, there=bool(there), stays=stays)
        if reason is not None:
            meter.waited(reason)
    operation = _efficient_attention if name == "_scaled_dot_product_efficient_attention" else operation
    here = {key: torch.device("cpu") if key == "device" and value else held(value) for key, value in kwargs.items()}
    result = operation(*map(held, args), **here)
    if not stays or name == "_local_scalar_dense":
        return result
    known = {id(value.held): value for value in there}  # an operation in place returns the tensor it was given
    return _wrapped(result, known)


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, has_sums: bool, *, scale: float | None = None
) -> tuple[Tensor, ...]:
    """As the CUDA kernel: scores are multiplied by log2(e), a row that sees no key has the sum 0, and sums are filled
    up to a multiple of 32 rows (`mem_eff_attention/kernel_forward.h` of PyTorch).
    """
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    sees_none = (bias.float() * _LOG2_E).isinf().all(-1)
    sums = pad(sums.masked_fill(sees_none, 0), (0, -sums.shape[-1] % 32), value=torch.nan)
    return found.masked_fill(sees_none[..., None], 0), sums, torch.zeros(()), torch.zeros(())


def _wrapped(value: Any, known: dict[int, PretendTensor]) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_wrapped(part, known) for part in value)
    if type(value) is not Tensor:
        return value
    return known[id(value)] if id(value) in known else PretendTensor(value)


@cache
def _name(operation: Any) -> str:
    return str(operation._schema.name.split("::")[-1])


@cache
def _is_view(operation: Any) -> bool:
    returned = [one.alias_info for one in operation._schema.returns[:1]]
    return any(alias is not None and not alias.is_write for alias in returned)


def _why_it_waits(name: str, args: tuple[Any, ...], *, there: bool, stays: bool) -> str | None:
    if name in ("_to_copy", "copy_"):
        comes = isinstance(args[0 if name == "_to_copy" else 1], PretendTensor)
        return None if comes == stays else "read" if comes else "write"
    if there and name == "_local_scalar_dense":
        return "read"
    if there and name in _SIZE_UNKNOWN:
        return name
    if name in _INDEXING and isinstance(args[0], PretendTensor):
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "read"  # `nonzero` of the mask
        return "write" if any(not isinstance(index, PretendTensor) for index in indices) else None
    return None
