"""Linear layers and attention of bfloat16 in packaged code, for CPUs that have AVX512-BF16 and no AMX.

oneDNN's products read weights as fast as memory gives them, too, but to call one takes about 20 us, between other work
and with cold caches: a sixth of SmolLM2's step. PyTorch's attention multiplies as float32, and takes two to four times
as long. `native.cpp` is compiled into the code that calls it. Its products were no slower than oneDNN's for any number
of rows from 1 to 512 (Zen 4), and compute a row in the same way whatever others stand beside it.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional

from ..compat import cpu_flags


_SOURCE = Path(__file__).with_suffix(".cpp")
_COLUMNS = 64  # of a block, as in `native.cpp`
_STEP = 32  # of a head's width


@torch.library.custom_op("resps::pack_linear", mutates_args=())
def pack_linear(weights: Sequence[Tensor]) -> Tensor:
    """Lay out the weights of layers that read the same input, in the order in which `bf16_linear` reads them.

    Args:
        weights: each `[o, i]`, of an even `i`.

    Returns:
        `[blocks, i / 2, 64, 2]`: of 64 outputs, the last ones padded by zeros, pairs of neighbouring inputs.
    """
    joined = torch.cat(list(weights))
    padded = functional.pad(joined, (0, 0, 0, -len(joined) % _COLUMNS))
    return padded.view(-1, _COLUMNS, joined.shape[1] // 2, 2).transpose(1, 2).contiguous()


@pack_linear.register_fake
def _(weights: Sequence[Tensor]) -> Tensor:
    blocks = -(-sum(weight.shape[0] for weight in weights) // _COLUMNS)
    return weights[0].new_empty(blocks, weights[0].shape[1] // 2, _COLUMNS, 2)


@torch.library.custom_op("resps::bf16_linear", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
def bf16_linear(rows: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """What `torch.nn.functional.linear` gives with the weights that were packed, up to rounding.

    Args:
        rows: `[..., i]`.
        packed: see `pack_linear`.
        bias: `[width]`.
        width: outputs of all layers.

    Returns:
        `[..., width]`
    """
    weight = packed.transpose(1, 2).reshape(-1, rows.shape[-1])[:width]
    return functional.linear(rows, weight, bias)


@bf16_linear.register_fake
def _(rows: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@torch.library.custom_op("resps::bf16_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def bf16_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives, up to rounding.

    Args:
        query: `[b, heads, q, hd]`.
        key: `[b, kv heads, t, hd]`.
        value: `[b, kv heads, t, vd]`.
        mask: `[b or 1, 1 or heads that share keys, q, t]`, added to the scores; `None` sees everything. A query that
            sees nothing gets zeros.
        scale: of the scores.

    Returns:
        `[b, q, heads, vd]`
    """
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat(1, key.shape[1], 1, 1)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).contiguous()


@bf16_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def native_operators() -> Mapping[torch._ops.OpOverload, list[str]]:
    """The operators that C++ calls without PyTorch's dispatcher, and their source."""
    source = _SOURCE.read_text(encoding="utf-8")
    return {torch.ops.resps.bf16_linear.default: [source], torch.ops.resps.bf16_attention.default: []}


def attends_natively(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether to call `bf16_attention`, which is faster in packaged code alone; masks may also be true where seen."""
    states = query, key, value
    return (
        torch.compiler.is_exporting()
        and is_native_faster()
        and all(part.dtype is torch.bfloat16 and part.device.type == "cpu" for part in states)
        and all(part.shape[-1] % _STEP == 0 and part.stride(-1) == 1 for part in states)
        and (mask is None or (mask.dtype in (torch.bfloat16, torch.bool) and mask.stride(-1) == 1))
    )


def use_native_linear(program: ExportedProgram) -> None:
    """Put `bf16_linear` in place of linear layers that it can serve, one for all layers that read the same input."""
    if not is_native_faster():
        return
    signature = program.graph_signature
    weights = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    readers: dict[tuple[Node, bool], list[Node]] = defaultdict(list)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        rows, *read = node.all_input_nodes
        if all(part.name in weights for part in read) and _is_served(*(part.meta["val"] for part in (rows, *read))):
            readers[rows, len(read) == 2].append(node)
    for (rows, _), layers in readers.items():
        _join(program.graph, rows, layers)
    program.graph_module.recompile()


@cache
def is_native_faster() -> bool:
    """Whether this machine has the instructions of `native.cpp`, and none that are better."""
    return sys.platform == "linux" and {"avx512_bf16", "amx_bf16"} & cpu_flags() == {"avx512_bf16"}


def _is_served(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    dtypes = {part.dtype for part in (rows, weight, bias) if part is not None}
    return dtypes == {torch.bfloat16} and weight.device.type == "cpu" and weight.shape[1] % 2 == 0


def _join(graph: torch.fx.Graph, rows: Node, layers: list[Node]) -> None:
    """Compute layers of the same input by one operator, where the first one stands."""
    weights, biases = [layer.args[1] for layer in layers], [layer.args[2] for layer in layers if len(layer.args) > 2]
    widths = [layer.args[1].meta["val"].shape[0] for layer in layers]  # type: ignore[union-attr]
    call: Any = graph.call_function
    with graph.inserting_before(layers[0]):
        bias = call(torch.ops.aten.cat.default, (biases,)) if biases else None
        packed = call(torch.ops.resps.pack_linear.default, (weights,))
        joined = call(torch.ops.resps.bf16_linear.default, (rows, packed, bias, sum(widths)))
        start = 0
        for layer, width in zip(layers, widths, strict=True):
            whole = len(layers) == 1
            own = joined if whole else call(torch.ops.aten.slice.Tensor, (joined, -1, start, start + width))
            layer.replace_all_uses_with(own)
            start += width
    for layer in layers:
        graph.erase_node(layer)
