"""Read the weights of quantized linear layers out of the tensors of torchao and bitsandbytes.

Weights of 8 or 4 bits ("few bits") are read faster than bfloat16, and a step takes as long as reading its weights.
Packaged code multiplies by them without decoding them in memory, see `native.py`; other code calls these libraries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .kernels import reads_few_bits


_GROUP = 64  # Inputs that share a scale when we round a weight to 4 bits.
_OUTPUT_HEAD = 16384  # A layer with at least this many outputs is taken for an output head.
_UNITS = 256  # Rows of the identity matrix that are multiplied at the same time.
_LEAST_GROUP = 32  # A group has a multiple of this number of inputs, as an AMX tile has.


class Codes(IntEnum):
    """Encodings of weights: what is stored for a weight, its code, and which number each code means.

    `native.cpp` uses the same values for these members.
    """

    INT8 = 0  # int8 codes; the number of code c is c + 0.5, whose sign and magnitude `native.cpp` looks up
    INT4 = 1  # uint8 codes from 0 to 15; the number of code c is c - 8
    NF4 = 2  # uint8 codes from 0 to 15, for the quantiles of a normal distribution (arXiv 2305.14314, appendix E)


NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


_BUFFERS = ("weight_codes", "weight_scales", "weight_offsets")
# Attributes of torchao's weights; not `None` if the layer rounds its input.
ROUNDING_MARKS = ("act_quant_kwargs", "activation_quantization", "act_mapping_type", "input_quant_func")
BLOCK = 32  # Number of outputs whose weights are stored together, as in `native.cpp`.
_HALF = BLOCK // 2


Parts: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class FewBits:
    """A quantized weight `[outputs, inputs]`: each element is the number that its code means, times a scale, plus an
    offset. A group of neighbouring inputs shares scale and offset. `read` returns codes `[outputs, inputs]`, int8 or
    uint8, and scales and offsets `[outputs, groups]` in float32; the offsets are `None` if all are zero.
    """

    kind: Codes
    read: Callable[[], Parts]

    def named(self) -> dict[str, Tensor]:
        """Call `read`; return codes, scales and offsets by the names of the buffers in which `exposed` puts them."""
        return {name: part for name, part in zip(_BUFFERS, self.read(), strict=True) if part is not None}


def numbers(codes: Tensor, kind: Codes | int) -> Tensor:
    """Convert codes of this `kind` to the numbers, in float32, that they mean."""
    if kind == Codes.INT8:
        return codes.float() + 0.5
    return codes.float() - 8 if kind == Codes.INT4 else codes.new_tensor(NF4_VALUES, dtype=torch.float32)[codes.long()]


@torch.library.custom_op("resps::few_bits_weight", mutates_args=())
def few_bits_weight(codes: Tensor, scales: Tensor, offsets: Tensor | None, kind: int) -> Tensor:
    """Return the bf16 weight `[outputs, inputs]` that the parts of a `FewBits` describe."""
    weight = numbers(codes, kind).unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    return (weight if offsets is None else weight + offsets[..., None]).flatten(1).bfloat16()


@few_bits_weight.register_fake
def _(codes: Tensor, *_: object) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.bfloat16)


@torch.library.custom_op("resps::few_bits_linear", mutates_args=())
def few_bits_linear(
    rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, kind: int
) -> Tensor:
    """Compute a linear layer, `[..., inputs]` -> `[..., outputs]`, with the weight that `FewBits.read` returned."""
    return functional.linear(rows, few_bits_weight(codes, scales, offsets, kind).to(rows.dtype), bias)


@few_bits_linear.register_fake
def _(rows: Tensor, codes: Tensor, *_: object) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], codes.shape[0])


@torch.library.custom_op("resps::rounding_scales", mutates_args=())
def rounding_scales(weight: Tensor, kind: int, groups: int) -> Tensor:
    """Return scales `[outputs, groups]` with which a bf16 weight is rounded to codes of this `kind`.

    With them, the highest INT8 code reaches a group's largest magnitude, and the number -8 of INT4 is a group's
    largest weight (llama.cpp's Q4_0).
    """
    parts = weight.float().unflatten(1, (groups, -1))
    if kind == Codes.INT8:
        return parts.abs().amax(dim=-1).clamp_min(1e-30) / 127.5
    scales = parts.gather(-1, parts.abs().argmax(dim=-1, keepdim=True))[..., 0] / -8
    return torch.where(scales == 0, 1e-30, scales)


@rounding_scales.register_fake
def _(weight: Tensor, kind: int, groups: int) -> Tensor:
    return weight.new_empty(weight.shape[0], groups, dtype=torch.float32)


@torch.library.custom_op("resps::rounded_codes", mutates_args=())
def rounded_codes(weight: Tensor, kind: int, groups: int) -> Tensor:
    """Divide a bf16 weight by its `rounding_scales`, and round it to codes of this `kind`."""
    parts = weight.float().unflatten(1, (groups, -1)) / rounding_scales(weight, kind, groups)[..., None]
    if kind == Codes.INT8:
        return parts.floor().clamp(-128, 127).to(torch.int8).flatten(1)
    return (parts.round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)


@rounded_codes.register_fake
def _(weight: Tensor, kind: int, groups: int) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int8 if kind == Codes.INT8 else torch.uint8)


def rounding(weight: Tensor, bits: int) -> tuple[Codes, int]:
    """Return the kind of codes to which a bf16 weight is rounded for `bits`, and its number of groups.

    With `bits` 4, output heads and layers whose inputs cannot be divided into groups are still rounded to 8 bits.
    """
    outputs, inputs = weight.shape
    if bits == 4 and outputs < _OUTPUT_HEAD and inputs % _GROUP == 0:
        return Codes.INT4, inputs // _GROUP
    return Codes.INT8, 1


@torch.library.custom_op("resps::pack_codes", mutates_args=())
def pack_codes(codes: Sequence[Tensor], kind: int, is_gated: bool) -> Tensor:
    """Join the codes `[outputs, inputs]` of layers with the same inputs, and reorder them for `packed_few_bits`.

    The result is `[blocks, lines, 64]` uint8. A block has 32 outputs; the last block is padded. A line has a block's
    codes of two inputs (8 bits: as sign and magnitude) or four (4 bits). For `is_gated` see `in_blocks`.
    """
    blocks = in_blocks(codes, is_gated=is_gated)
    if kind == Codes.INT8:
        signed = torch.where(blocks < 0, ~blocks | -128, blocks).view(torch.uint8)
        pairs = signed.unflatten(2, (-1, 2)).transpose(1, 2)  # [blocks, lines, 32, 2]
        # `native.cpp` takes 8 codes in turn for each of two vectors.
        return pairs.reshape(len(blocks), -1, 2, 4, 8).transpose(2, 3).reshape(len(blocks), -1, 64).contiguous()
    pairs = blocks.to(torch.int32).unflatten(2, (-1, 2, 2)).permute(0, 2, 3, 1, 4)  # [blocks, lines, 2, 32, 2]
    vectors = pairs.reshape(len(blocks), -1, 4, 32)
    words = sum(vectors[:, :, place] << 4 * place for place in range(4))
    return words.to(torch.uint16).contiguous().view(torch.uint8).reshape(len(blocks), -1, 64)


@pack_codes.register_fake
def _(codes: Sequence[Tensor], kind: int, is_gated: bool) -> Tensor:
    blocks = -(-sum(len(part) for part in codes) // BLOCK)
    return codes[0].new_empty(blocks, codes[0].shape[1] // (2 if kind == Codes.INT8 else 4), 64, dtype=torch.uint8)


@torch.library.custom_op("resps::pack_factors", mutates_args=())
def pack_factors(factors: Sequence[Tensor], is_gated: bool) -> Tensor:
    """Join layers' scales or offsets `[outputs, groups]` to `[blocks, groups, 32]`, with the blocks of `pack_codes`.

    Raises a `RuntimeError` if a value is not finite.
    """
    if not all(bool(part.isfinite().all()) for part in factors):
        raise RuntimeError("a scale of its quantized weights is not finite")
    return in_blocks(factors, is_gated=is_gated).transpose(1, 2).clone(memory_format=torch.contiguous_format)


@pack_factors.register_fake
def _(factors: Sequence[Tensor], is_gated: bool) -> Tensor:
    return factors[0].new_empty(-(-sum(len(part) for part in factors) // BLOCK), factors[0].shape[1], BLOCK)


@torch.library.custom_op("resps::packed_few_bits", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
def packed_few_bits(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    width: int,
    kind: int,
    is_gated: bool,
    tiles_from: int,
) -> Tensor:
    """In packaged code, multiply bf16 rows by weights from `pack_codes` and `pack_factors`; return `[..., width]`.

    With `is_gated`, it returns `silu(first(rows)) * second(rows)` of two packed layers. For `tiles_from` see `Choice`.
    """
    raise NotImplementedError("native.cpp has the only implementation")


@packed_few_bits.register_fake
def _(
    rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, width: int, *_: int
) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


def in_blocks(parts: Sequence[Tensor], *, is_gated: bool) -> Tensor:
    """Join the matrices `parts` `[outputs, n]` to blocks of 32 outputs, `[blocks, 32, n]`, padded by zeros.

    The result may be a view of a single part. With `is_gated`, each block has 16 outputs of the first of two parts,
    then 16 of the second.
    """
    if is_gated:
        joined = torch.stack([part.unflatten(0, (-1, _HALF)) for part in parts], dim=1).flatten(0, 2)
    else:
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    missing = -len(joined) % BLOCK
    return (functional.pad(joined, (0, 0, 0, missing)) if missing else joined).unflatten(0, (-1, BLOCK))


def few_bits(layer: nn.Module) -> FewBits | None:
    """Return a layer's weight if it has 8 or 4 bits, else `None`. Codes are read only when `FewBits.read` is called.

    Weights are recognised by the names of their classes, and only in layers that compute in bfloat16 on a CPU.
    """
    weight: Any = layer._parameters.get("weight")
    kind = type(weight)
    recognise = _KNOWN.get(f"{kind.__module__.partition('.')[0]} {kind.__name__}")
    return recognise(weight) if recognise and isinstance(layer, nn.Linear) and weight.device.type == "cpu" else None


def has_few_bits(module: nn.Module) -> bool:
    """Whether a layer of the module has a weight of 8 or 4 bits."""
    return any(few_bits(layer) is not None for layer in module.modules())


def unread_weights(model: PreTrainedModel) -> list[str]:
    """Return class names of the model's quantized or sharded weights that compiled code cannot read on this CPU."""
    is_served = reads_few_bits() and model.dtype is torch.bfloat16  # a cast changes this dtype, but few such weights
    known = {id(layer.weight) for layer in model.modules() if is_served and few_bits(layer) is not None}
    odd = (weight for weight in model.parameters() if type(weight) is not nn.Parameter and id(weight) not in known)
    return sorted({type(weight).__name__ for weight in odd})


def _int_tensor(weight: Any) -> FewBits | None:
    """Convert torchao's `Int8Tensor`, or its `IntxUnpackedToInt8Tensor` of up to 8 bits.

    The weight is `(integers - zero_point) * scale`. Returns `None` if its groups do not fit `FewBits`, or if the layer
    also quantizes or scales its inputs.
    """
    integers, is_plain = weight.qdata, _takes_plain_inputs(weight) and weight.dtype is torch.bfloat16
    if not is_plain or integers.dim() != 2:
        return None
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    (outputs, inputs), (height, width) = integers.shape, weight.block_size
    if height not in (1, outputs) or not _has_groups(inputs, width):
        return None

    def read() -> Parts:
        scales = weight.scale.float().reshape(-1, inputs // width).expand(outputs, -1).contiguous()
        points = getattr(weight, "zero_point", None)  # older releases have no such attribute
        zeros = torch.zeros(1, 1) if points is None else points.float().reshape(-1, inputs // width)
        if bits > 4:
            return integers, scales, -(zeros + 0.5) * scales
        return (integers + 8).to(torch.uint8), scales, -zeros * scales if bool(zeros.any()) else None

    return FewBits(Codes.INT8 if bits > 4 else Codes.INT4, read)


def _opaque_tensor(weight: Any) -> FewBits | None:
    """Convert torchao's `Int4OpaqueTensor`, which PyTorch packs for this CPU; `None` if `FewBits` cannot hold it."""
    inputs, (height, width) = weight.shape[1], weight.block_size
    is_plain = _takes_plain_inputs(weight) and weight.dtype is torch.bfloat16
    if not is_plain or height != 1 or not _has_groups(inputs, width):
        return None

    def read() -> Parts:
        # The operator computes `(code - 8) * scale + zero`: with these factors, products with the identity are codes.
        factors = weight.scale_and_zero.new_tensor([1.0, 8.0]).expand_as(weight.scale_and_zero).contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        units = torch.eye(inputs, dtype=torch.bfloat16).split(_UNITS)
        columns = [multiply(part, weight.qdata, width, factors).to(torch.uint8) for part in units]
        scales, offsets = weight.scale_and_zero.float().permute(2, 1, 0).contiguous()
        return torch.cat(columns).t().contiguous(), scales, offsets

    return FewBits(Codes.INT4, read)


def _params_4bit(weight: Any) -> FewBits | None:
    """Convert bitsandbytes' NF4 weight, which the layer's first forward packs for this CPU; `None` for other kinds."""
    state = weight.quant_state
    if state is None or state.quant_type != "nf4" or state.dtype is not torch.bfloat16:
        return None
    outputs, inputs = state.shape

    def read() -> Parts:
        data = weight.data.view(torch.uint8)
        if getattr(state, "packing_format_for_cpu", False):
            # Blocks of 32 outputs hold pairs of inputs. A byte has the nibbles of two places 32 apart.
            places = data.reshape(-1, 1, BLOCK)
            pairs = torch.cat([places & 15, places >> 4], dim=1).reshape(-1, inputs // 2, BLOCK, 2)
            return pairs.transpose(1, 2).reshape(outputs, inputs), state.absmax.t().float().contiguous(), None
        scales = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = torch.stack([data >> 4, data & 15], dim=-1).reshape(outputs, inputs)
        return codes, scales.bfloat16().float().reshape(outputs, -1), None  # rounded, as packing rounds them

    return FewBits(Codes.NF4, read) if _has_groups(inputs, state.blocksize) else None


def _takes_plain_inputs(weight: Any) -> bool:
    """Whether a layer with this torchao weight, of any release, neither rounds nor scales its inputs."""
    return all(getattr(weight, name, None) is None for name in (*ROUNDING_MARKS, "act_pre_scale"))


def _has_groups(inputs: int, width: int) -> bool:
    return inputs % width == 0 and width % _LEAST_GROUP == 0


_KNOWN: Mapping[str, Callable[[Any], FewBits | None]] = {  # by package and class
    "torchao Int8Tensor": _int_tensor,
    "torchao IntxUnpackedToInt8Tensor": _int_tensor,
    "torchao Int4OpaqueTensor": _opaque_tensor,
    "bitsandbytes Params4bit": _params_4bit,
}


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name; buffers as in `exposed` replace weights of few bits."""
    made, read = dict[str, Tensor](), dict[str, FewBits]()
    for name, layer in module.named_modules(remove_duplicate=False):
        weight = few_bits(layer)
        if weight is not None:
            read[f"{name}.weight".removeprefix(".")] = weight
    every = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        if name in read:
            made |= {name.removesuffix("weight") + part: value for part, value in read[name].named().items()}
        else:
            made[name] = tensor.detach()
    return made


@contextmanager
def exposed(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block, let layers with weights of few bits compute `few_bits_linear` from plain buffers.

    `torch.export` then traces no code of torchao or bitsandbytes. After the block the layers are as before.
    """
    changed = list[tuple[nn.Module, dict[str, Any]]]()
    try:
        for layer in module.modules():
            weight = few_bits(layer)
            if weight is None:
                continue
            changed.append((layer, dict(vars(layer))))
            layer._parameters = {name: part for name, part in layer._parameters.items() if name != "weight"}
            layer._buffers = {**layer._buffers, **weight.named()}
            layer.forward = _operator_of(layer, weight.kind)
        yield
    finally:
        for layer, before in changed:
            vars(layer).clear()
            vars(layer).update(before)


def _operator_of(layer: nn.Module, kind: Codes) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        codes, scales, offsets = map(layer._buffers.get, _BUFFERS)
        return torch.ops.resps.few_bits_linear(input, codes, scales, offsets, layer._parameters["bias"], int(kind))

    return forward
