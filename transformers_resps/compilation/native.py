"""Linear layers and attention of bfloat16 in packaged code, for CPUs that have AVX512-BF16, with AMX or without.

oneDNN's products read weights as fast as memory gives them, too, but to call one takes about 20 us, between other work
and with cold caches: a sixth of SmolLM2's step. PyTorch's attention multiplies as float32, and takes two to four times
as long. `native.cpp` is compiled into the code that calls it, and computes a row in the same way whatever others stand
beside it. `kernels.py` says for how many rows which kernel runs.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional

from .kernels import NEVER, SOURCE, Choice, Kernels, Products, chosen_kernels, our_kernels


_BLOCK = 32  # outputs whose weights lie together, as in `native.cpp`
_STEP = 32  # of a head's width


@torch.library.custom_op("resps::pack_linear", mutates_args=())
def pack_linear(weights: Sequence[Tensor]) -> Tensor:
    """Lay out the weights of layers that read the same input, in the order in which `bf16_linear` reads them.

    Args:
        weights: each `[o, i]`, of an even `i`.

    Returns:
        `[blocks, i / 2, 32, 2]`: of 32 outputs, the last ones padded by zeros, pairs of neighbouring inputs.
    """
    return _packed(torch.cat(list(weights)))


@pack_linear.register_fake
def _(weights: Sequence[Tensor]) -> Tensor:
    blocks = -(-sum(weight.shape[0] for weight in weights) // _BLOCK)
    return weights[0].new_empty(blocks, weights[0].shape[1] // 2, _BLOCK, 2)


@torch.library.custom_op("resps::bf16_linear", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
def bf16_linear(
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    width: int,
    tiles_from: int,
    library_from: int,
) -> Tensor:
    """What `torch.nn.functional.linear` gives with the weights that were packed, up to rounding.

    Args:
        rows: `[..., i]`.
        packed: see `pack_linear`.
        bias: `[width]`.
        weight: `[width, i]`, for the library; `None` where it never multiplies.
        width: outputs of all layers.
        tiles_from: rows from which tiles multiply, see `Choice`.
        library_from: rows from which the library does.

    Returns:
        `[..., width]`
    """
    return functional.linear(rows, packed.transpose(1, 2).reshape(-1, rows.shape[-1])[:width], bias)


@bf16_linear.register_fake
def _(
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    width: int,
    tiles_from: int,
    library_from: int,
) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@torch.library.custom_op("resps::pack_gated", mutates_args=())
def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """As `pack_linear`, of two weights `[o, i]`, whose o is a multiple of 16: half of each block is the gate's."""
    halves = [part.unflatten(0, (-1, _BLOCK // 2)) for part in (gate, up)]
    return _packed(torch.stack(halves, dim=1).flatten(0, 2))


@pack_gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(2 * gate.shape[0] // _BLOCK, gate.shape[1] // 2, _BLOCK, 2)


@torch.library.custom_op("resps::bf16_gated", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
def bf16_gated(
    rows: Tensor, packed: Tensor, weight: Tensor | None, width: int, tiles_from: int, library_from: int
) -> Tensor:
    """What `silu(gate) * up` gives, up to rounding.

    Args:
        rows: `[..., i]` the input of both.
        packed: see `pack_gated`.
        weight: `[2 * width, i]`, the gate's first; see `bf16_linear`, as the last two.
        width: outputs of each.
        tiles_from: rows from which tiles multiply.
        library_from: rows from which the library does.

    Returns:
        `[..., width]`
    """
    both = bf16_linear(rows, packed, None, None, 2 * width, NEVER, NEVER).unflatten(-1, (-1, 2, _BLOCK // 2))
    return functional.silu(both[..., 0, :]).mul(both[..., 1, :]).flatten(-2)


@bf16_gated.register_fake
def _(rows: Tensor, packed: Tensor, weight: Tensor | None, width: int, tiles_from: int, library_from: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@torch.library.custom_op("resps::bf16_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def bf16_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, tiles_from: int = NEVER
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives, up to rounding.

    Args:
        query: `[b, heads, q, hd]`.
        key: `[b, kv heads, t, hd]`.
        value: `[b, kv heads, t, vd]`.
        mask: `[b or 1, 1 or heads that share keys, q, t]`, added to the scores; `None` sees everything. A query that
            sees nothing gets zeros.
        scale: of the scores.
        tiles_from: queries that share keys, from which tiles multiply; set where the code is compiled.

    Returns:
        `[b, q, heads, vd]`
    """
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat(1, key.shape[1], 1, 1)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).contiguous()


@bf16_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, tiles_from: int = NEVER) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("resps::bf16_block_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def bf16_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    nodes: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    scale: float,
    tiles_from: int = NEVER,
) -> Tensor:
    """Attention of the nodes of a tree to blocks of 64 keys, in the order of the text. What a node gets hangs on its
    own text alone.

    Args:
        query: `[b, heads, n, hd]`.
        key: `[b, kv heads, t, hd]`: the first blocks are all nodes', where they lie.
        value: `[b, kv heads, t, vd]`.
        mask: `[b, 1, n * blocks + g * 4, 64]`, added to the scores: of each node over the shared blocks, then of each
            node of a group over the group's own block. A node that sees nothing gets zeros.
        nodes: `[b, g, 4]` that read a block of their own together; any where the mask shows nothing.
        slots: `[b, g, 64]` of the keys of that block.
        sinks: `[heads]` scores that take a share of each node's weights.
        scale: of the scores.
        tiles_from: as in `bf16_attention`.

    Returns:
        `[b, n, heads, vd]`
    """
    (rows, groups, size), count = slots.shape, query.shape[2]
    length = (mask.shape[2] - groups * nodes.shape[2]) // count * size
    index = slots.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    keys, values = (
        torch.cat([part[:, :, :length], part.gather(2, index.expand(-1, -1, -1, part.shape[3]))], dim=2)
        for part in (key, value)
    )
    shared, own = mask[:, 0].split([mask.shape[2] - groups * nodes.shape[2], groups * nodes.shape[2]], dim=1)
    hidden = mask.new_full((rows, count, groups, size), -torch.inf)
    for group in range(groups):
        place = nodes[:, group, :, None].expand(-1, -1, size)
        of_group = own.unflatten(1, nodes.shape[1:])[:, group]
        hidden[:, :, group] = hidden[:, :, group].scatter_reduce(1, place, of_group, "amax")
    shown = torch.cat([shared.reshape(rows, count, length), hidden.flatten(2)], dim=2)[:, None].float()
    sharing = query.shape[1] // key.shape[1]
    keys, values = (part.float().repeat_interleave(sharing, dim=1) for part in (keys, values))
    scores = query.float() @ keys.mT * scale + shown
    sees = shown.amax(-1, keepdim=True) > -1e38
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(rows, -1, count, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : values.shape[2]].where(sees, 0)
    return (weights @ values).transpose(1, 2).to(value.dtype).contiguous()


@bf16_block_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    nodes: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    scale: float,
    tiles_from: int = NEVER,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def native_operators() -> Mapping[torch._ops.OpOverload, list[str]]:
    """The operators that C++ calls without PyTorch's dispatcher, and their source."""
    source = SOURCE.read_text(encoding="utf-8")
    operators = torch.ops.resps
    calls = (
        operators.bf16_linear,
        operators.bf16_gated,
        operators.bf16_attention,
        operators.bf16_block_attention,
    )
    return {call.default: [] if place else [source] for place, call in enumerate(calls)}


def attends_natively(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether to call operators of attention, faster in packaged code alone; masks may also be true where seen."""
    states = query, key, value
    return (
        torch.compiler.is_exporting()
        and bool(our_kernels())
        and all(part.dtype is torch.bfloat16 and part.device.type == "cpu" for part in states)
        and all(part.shape[-1] % _STEP == 0 and part.stride(-1) == 1 for part in states)
        and (mask is None or (mask.dtype in (torch.bfloat16, torch.bool) and mask.stride(-1) == 1))
    )


def keeps_rows_apart(dtype: torch.dtype) -> bool:
    """Whether kernels of ours, in which no row knows another, compute packaged code in this dtype here."""
    return dtype is torch.bfloat16 and bool(our_kernels())


def use_native(program: ExportedProgram, *, alike: bool) -> Kernels:
    """Put `bf16_linear` in place of linear layers that it can serve, one for all layers that read the same input, and
    say for how many rows which kernel runs.

    Args:
        program: is changed.
        alike: whether a row must get the same bits whatever others there are.
    """
    readers = _layers(program) if our_kernels() else {}
    layers = [node for of_one in readers.values() for node in of_one]
    attending = [
        node
        for operator in (torch.ops.resps.bf16_attention.default, torch.ops.resps.bf16_block_attention.default)
        for node in program.graph.find_nodes(op="call_function", target=operator)
    ]
    linear = tuple((weight.shape[1], weight.shape[0]) for weight in (_value(node.args[1]) for node in layers))
    states = [[_value(part) for part in node.args[:2]] for node in attending]
    heads = tuple((query.shape[1], key.shape[1], query.shape[3]) for query, key in states)
    kernels = chosen_kernels(Products(linear, heads), alike=alike)
    for node in attending:
        _attend_by(program.graph, node, kernels.attention)
    if kernels.linear.library_from > 1:
        for of_one in readers.values():
            gated = _gated(*of_one) if len(of_one) == 2 else None
            if gated is None:
                _join(program.graph, of_one, kernels.linear)
            else:
                _replace_gated(program.graph, gated, kernels.linear)
    program.graph_module.recompile()
    return kernels


def _layers(program: ExportedProgram) -> dict[tuple[Node, bool], list[Node]]:
    """The layers that `bf16_linear` can serve, by their input and whether they have a bias."""
    signature = program.graph_signature
    weights = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    readers: dict[tuple[Node, bool], list[Node]] = defaultdict(list)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        rows, *read = node.all_input_nodes
        if all(part.name in weights for part in read) and _is_served(*(part.meta["val"] for part in (rows, *read))):
            readers[rows, len(read) == 2].append(node)
    return readers


def _value(node: Any) -> Tensor:
    """An example of what a node gives."""
    value: Tensor = node.meta["val"]
    return value


def _attend_by(graph: torch.fx.Graph, node: Node, choice: Choice) -> None:
    """Tell an operator of attention which kernel it calls, or put PyTorch's in its place, which knows no blocks."""
    known = 5 if node.target is torch.ops.resps.bf16_attention.default else 8
    if choice.library_from > 1 or known != 5:
        node.args = (*node.args[:known], choice.tiles_from)
        return
    call: Any = graph.call_function
    query, key, value, mask, scale = node.args[:5]
    with graph.inserting_before(node):
        if mask is not None and _value(mask).shape[1] > 1:
            mask = call(torch.ops.aten.repeat.default, (mask, [1, _value(key).shape[1], 1, 1]))
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
        attended = call(torch.ops.aten.scaled_dot_product_attention.default, (query, key, value), options)
        turned = call(torch.ops.aten.transpose.int, (attended, 1, 2))
        node.replace_all_uses_with(call(torch.ops.aten.contiguous.default, (turned,)))
    graph.erase_node(node)


def _packed(weight: Tensor) -> Tensor:
    padded = functional.pad(weight, (0, 0, 0, -len(weight) % _BLOCK))
    return padded.view(-1, _BLOCK, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def _is_served(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    dtypes = {part.dtype for part in (rows, weight, bias) if part is not None}
    return dtypes == {torch.bfloat16} and weight.device.type == "cpu" and weight.shape[1] % 2 == 0


class _Gated(NamedTuple):
    """`product` is `silu(gate) * up`, and nothing else reads these."""

    product: Node
    silu: Node
    gate: Node
    up: Node


def _gated(*layers: Node) -> _Gated | None:
    """What two layers of the same input make, if it is that."""
    if any(len(layer.users) != 1 or len(layer.all_input_nodes) > 2 for layer in layers):  # read otherwise, or biased
        return None
    for gate, up in permutations(layers):
        (silu,), (product,) = gate.users, up.users
        if (silu.target, product.target) != (torch.ops.aten.silu.default, torch.ops.aten.mul.Tensor):
            continue
        width = _value(gate).shape[-1]
        fits = width == _value(up).shape[-1] and width % (_BLOCK // 2) == 0
        if fits and len(silu.users) == 1 and set(product.args) == {silu, up}:
            return _Gated(product, silu, gate, up)
    return None


def _replace_gated(graph: torch.fx.Graph, of: _Gated, choice: Choice) -> None:
    """Compute it by one operator."""
    call: Any = graph.call_function
    with graph.inserting_before(of.product):
        weights = [of.gate.args[1], of.up.args[1]]
        packed = call(torch.ops.resps.pack_gated.default, tuple(weights))
        width = _value(of.product).shape[-1]
        args = of.gate.args[0], packed, _of_library(graph, weights, choice), width, *choice
        of.product.replace_all_uses_with(call(torch.ops.resps.bf16_gated.default, args))
    for node in of:
        graph.erase_node(node)


def _of_library(graph: torch.fx.Graph, weights: list[Any], choice: Choice) -> Any:
    """The weights as the library reads them, in one; `None` where it never does."""
    if choice.library_from == NEVER or len(weights) == 1:
        return None if choice.library_from == NEVER else weights[0]
    call: Any = graph.call_function
    return call(torch.ops.aten.cat.default, (weights,))


def _join(graph: torch.fx.Graph, layers: list[Node], choice: Choice) -> None:
    """Compute layers of the same input by one operator, where the first one stands."""
    weights, biases = [layer.args[1] for layer in layers], [layer.args[2] for layer in layers if len(layer.args) > 2]
    widths = [layer.args[1].meta["val"].shape[0] for layer in layers]  # type: ignore[union-attr]
    call: Any = graph.call_function
    with graph.inserting_before(layers[0]):
        bias = call(torch.ops.aten.cat.default, (biases,)) if biases else None
        packed = call(torch.ops.resps.pack_linear.default, (weights,))
        args = layers[0].args[0], packed, bias, _of_library(graph, weights, choice), sum(widths), *choice
        joined = call(torch.ops.resps.bf16_linear.default, args)
        start = 0
        for layer, width in zip(layers, widths, strict=True):
            whole = len(layers) == 1
            own = joined if whole else call(torch.ops.aten.slice.Tensor, (joined, -1, start, start + width))
            layer.replace_all_uses_with(own)
            start += width
    for layer in layers:
        graph.erase_node(layer)
