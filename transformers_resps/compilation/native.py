"""Linear layers and attention in bfloat16 for packaged code, on CPUs with AVX512-BF16, with AMX or without.

oneDNN reads weights as fast, but each call has an overhead of about 20 us between other work and with cold caches: in
all, a sixth of SmolLM2's step. PyTorch's attention multiplies in float32, and takes two to four times as long.
`native.cpp` is compiled into the code that calls it. With its kernels, the result of a row does not depend on other
rows, not even in its last bits. `kernels.py` chooses the kernel for each number of rows.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import Argument
from torch.nn import functional

from .few_bits import BLOCK, Codes, in_blocks, rounding
from .kernels import (
    NEVER,
    SOURCE,
    Choice,
    Kernels,
    Products,
    chosen_kernels,
    few_bits_kernel,
    our_kernels,
    reads_few_bits,
)


_STEP = 32  # A head's width is a multiple of this.
_Operator: TypeAlias = torch._ops.OpOverload


@torch.library.custom_op("resps::pack_linear", mutates_args=())
def pack_linear(weights: Sequence[Tensor]) -> Tensor:
    """Rearrange the weights `[outputs, i]` of layers with the same i inputs for `bf16_linear`; `i` must be even.

    The result is `[blocks, i / 2, 32, 2]`: blocks of 32 outputs, padded by zeros, with pairs of neighbouring inputs.
    """
    return _packed(weights, is_gated=False)


@pack_linear.register_fake
def _(weights: Sequence[Tensor]) -> Tensor:
    blocks = -(-sum(weight.shape[0] for weight in weights) // BLOCK)
    return weights[0].new_empty(blocks, weights[0].shape[1] // 2, BLOCK, 2)


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
    """Compute `torch.nn.functional.linear`, `[..., i]` -> `[..., width]`, up to rounding, with `packed` weights.

    `packed` is made by `pack_linear` from weights with i inputs; `bias` is `[width]`. `weight` `[width, i]` is read by
    oneDNN, and `None` if oneDNN is never used. For the last two arguments see `Choice`.
    """
    return functional.linear(rows, packed.transpose(1, 2).reshape(-1, rows.shape[-1])[:width], bias)


@bf16_linear.register_fake
def _(rows: Tensor, packed: Tensor, bias: Tensor | None, weight: Tensor | None, width: int, *_: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@torch.library.custom_op("resps::pack_gated", mutates_args=())
def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Rearrange two weights `[outputs, inputs]` like `pack_linear`; half of each block is `gate`'s, half is `up`'s.

    The number of outputs must be a multiple of 16.
    """
    return _packed([gate, up], is_gated=True)


@pack_gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(2 * gate.shape[0] // BLOCK, gate.shape[1] // 2, BLOCK, 2)


@torch.library.custom_op("resps::bf16_gated", mutates_args=(), tags=(torch.Tag.needs_contiguous_strides,))
def bf16_gated(
    rows: Tensor, packed: Tensor, weight: Tensor | None, width: int, tiles_from: int, library_from: int
) -> Tensor:
    """Compute `silu(gate(rows)) * up(rows)` `[..., width]`, up to rounding, with the result of `pack_gated`.

    `weight` `[2 * width, inputs]` begins with the gate's weight; for the other arguments see `bf16_linear`.
    """
    both = bf16_linear(rows, packed, None, None, 2 * width, NEVER, NEVER).unflatten(-1, (-1, 2, BLOCK // 2))
    return functional.silu(both[..., 0, :]).mul(both[..., 1, :]).flatten(-2)


@bf16_gated.register_fake
def _(rows: Tensor, packed: Tensor, weight: Tensor | None, width: int, *_: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@torch.library.custom_op("resps::bf16_attention", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def bf16_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, tiles_from: int = NEVER
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention`, up to rounding, as `[b, q, heads, vd]`.

    `query` is `[b, heads, q, hd]`, `key` `[b, kv heads, t, hd]` and `value` `[b, kv heads, t, vd]`, of width vd.
    `mask` `[b or 1, 1 or heads / kv heads, q, t]` is added to the scores; `None` hides nothing. The result is zero for
    a query without a visible key. `tiles_from` (see `Choice`; set when compiling) counts queries that share keys.
    """
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat(1, key.shape[1], 1, 1)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).contiguous()


@bf16_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
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
    """Compute attention of a tree's nodes to blocks of 64 keys, `[b, n, heads, vd]`; only packaged code calls this.

    The result of a node depends only on the node's own text, up to the node, even in its last bits.

    Args:
        query: `[b, heads, n, hd]`.
        key: `[b, kv heads, t, hd]`. All nodes share its first blocks. Up to 4 nodes, a group, share another block.
        value: `[b, kv heads, t, vd]`, values of width vd.
        mask: `[b, 1, n * blocks + g * 4, 64]`, added to the scores: first for each node and shared block, then for
            each node of g groups and the group's own block. The result is zero for a node without visible keys.
        nodes: `[b, g, 4]` the nodes of each group; arbitrary where the mask hides all keys.
        slots: `[b, g, 64]` indices into `key` of each group's own block, in the order of the text.
        sinks: `[heads]` attention sinks: scores that take a share of each node's weights; `None` for none.
        scale: factor of the scores.
        tiles_from: as in `bf16_attention`.
    """
    raise NotImplementedError("native.cpp has the only implementation")


@bf16_block_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def native_operators() -> Mapping[_Operator, list[str]]:
    """Map our operators to C++ source that inductor includes: `native.cpp` for the first, nothing for the others."""
    operators = torch.ops.resps
    first, *others = (
        operators.bf16_linear,
        operators.bf16_gated,
        operators.bf16_attention,
        operators.bf16_block_attention,
        operators.packed_few_bits,
    )
    return {first.default: [SOURCE.read_text(encoding="utf-8")], **{call.default: [] for call in others}}


def attends_natively(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether to call our attention operators: only while `torch.export` traces packaged code. `mask` may be bool."""
    states = query, key, value
    return (
        torch.compiler.is_exporting()
        and bool(our_kernels())
        and all(part.dtype is torch.bfloat16 and part.device.type == "cpu" for part in states)
        and all(part.shape[-1] % _STEP == 0 and part.stride(-1) == 1 for part in states)
        and (mask is None or (mask.dtype in (torch.bfloat16, torch.bool) and mask.stride(-1) == 1))
    )


def keeps_rows_apart(dtype: torch.dtype) -> bool:
    """Whether packaged code in this dtype calls our kernels, so that a row's result does not depend on other rows."""
    return dtype is torch.bfloat16 and bool(our_kernels())


def use_native(program: ExportedProgram, *, alike: bool, bits: int = 16) -> Kernels:
    """Change an exported program in place so that it calls our operators; return the kernels chosen for it.

    All linear layers with the same input become one operator. With `alike`, the result of a row must not depend on
    other rows. Weights in bf16 are rounded to `bits` (8 or 4) if our kernels can read them.
    """
    graph = program.graph
    if bits < 16 and reads_few_bits():
        _round_weights(program, bits)
    by_input = _layers(program) if our_kernels() else {}
    attending = [
        node
        for operator in (torch.ops.resps.bf16_attention.default, torch.ops.resps.bf16_block_attention.default)
        for node in graph.find_nodes(op="call_function", target=operator)
    ]
    weights = [
        _value(layer.args[1]) for (_, layout), layers in by_input.items() if layout.kind is None for layer in layers
    ]
    states = [[_value(part) for part in node.args[:2]] for node in attending]
    heads = tuple((query.shape[1], key.shape[1], query.shape[3]) for query, key in states)
    products = Products(tuple((weight.shape[1], weight.shape[0]) for weight in weights), heads)
    kernels = chosen_kernels(products, alike=alike)
    for node in attending:
        _choose_attention(graph, node, kernels.attention)
    for (_, layout), layers in by_input.items():
        choice = kernels.linear if layout.kind is None else few_bits_kernel()
        if choice.library_from > 1 and not _fuse_gated(graph, layers, layout, choice):
            _join(graph, layers, choice)
    program.graph_module.recompile()
    return kernels


class _Layout(NamedTuple):
    """Says how the weight of a layer is stored. Layers of the same input and layout can become one operator."""

    has_bias: bool
    kind: Codes | None = None  # `None` for bf16
    groups: int = 1  # groups of inputs; a weight's scale depends on its output and group
    has_offsets: bool = False  # whether an offset is added to each scaled weight


def _layers(program: ExportedProgram) -> dict[tuple[Node, _Layout], list[Node]]:
    """Return the layers that our operators can replace, grouped by their input and layout."""
    by_input: dict[tuple[Node, _Layout], list[Node]] = defaultdict(list)
    for node, rows, own in _bf16_layers(program):
        by_input[rows, _Layout(has_bias=len(own) == 2)].append(node)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.resps.few_bits_linear.default):
        rows, _, scales, offsets, bias, kind = node.args
        if _value(rows).dtype is torch.bfloat16:
            layout = _Layout(bias is not None, Codes(kind), _value(scales).shape[1], offsets is not None)
            by_input[rows, layout].append(node)
    return by_input


def _bf16_layers(program: ExportedProgram) -> Iterator[tuple[Node, Node, list[Node]]]:
    """Yield each linear layer with bf16 weights, its input, and its weight and bias."""
    signature = program.graph_signature
    weights = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        rows, *own = node.all_input_nodes
        if all(part.name in weights for part in own) and _is_served(*(_value(part) for part in (rows, *own))):
            yield node, rows, own


def _round_weights(program: ExportedProgram, bits: int) -> None:
    """Let linear layers multiply by weights rounded to `bits`: layers with bf16 weights, for 4 bits also int8 ones."""
    graph, operators = program.graph, torch.ops.resps
    first = next(node for node in graph.nodes if node.op != "placeholder")  # joined layers read all weights there
    rounds = {
        Codes.INT8: (operators.int8_codes.default, operators.int8_scales.default),
        Codes.INT4: (operators.int4_codes.default, operators.int4_scales.default),
    }
    layers = list(_bf16_layers(program))
    for node in graph.find_nodes(op="call_function", target=operators.few_bits_linear.default):
        rows, *coded, bias, kind = node.args
        if bits == 4 and kind == Codes.INT8:
            arguments = *coded, kind
            with graph.inserting_before(first):
                weight = _call(graph, operators.few_bits_weight.default, *arguments)
            weight.meta["val"] = operators.few_bits_weight(*torch.fx.map_arg(arguments, _value))
            layers.append((node, rows, [weight, bias] if bias else [weight]))
    for node, rows, (weight, *bias) in layers:
        kind, *groups = rounding(_value(weight), bits)
        with graph.inserting_before(first):
            parts = [_call(graph, operator, weight, *groups) for operator in rounds[kind]]
        for part, operator in zip(parts, rounds[kind], strict=True):
            part.meta["val"] = operator(_value(weight), *groups)
        arguments = rows, *parts, None, bias[0] if bias else None, int(kind)
        with graph.inserting_before(node):
            rounded = _call(graph, operators.few_bits_linear.default, *arguments)
        rounded.meta["val"] = _value(node)
        node.replace_all_uses_with(rounded)
        graph.erase_node(node)


def _value(node: Argument) -> Tensor:
    """Return the tensor that describes a node's result in the example with which the program was exported."""
    assert isinstance(node, Node)
    value: Tensor = node.meta["val"]
    return value


def _call(graph: Graph, operator: _Operator, *arguments: Argument, **keywords: Argument) -> Node:
    return graph.call_function(operator, arguments, keywords)


def _choose_attention(graph: Graph, node: Node, choice: Choice) -> None:
    """Set `tiles_from` of our attention operator, or replace it by PyTorch's; block attention is never replaced."""
    takes_blocks = node.target is torch.ops.resps.bf16_block_attention.default
    if choice.library_from > 1 or takes_blocks:
        node.args = (*node.args[: 8 if takes_blocks else 5], choice.tiles_from)
        return
    aten = torch.ops.aten
    query, key, value, mask, scale = node.args[:5]
    with graph.inserting_before(node):
        if mask is not None and _value(mask).shape[1] > 1:
            mask = _call(graph, aten.repeat.default, mask, [1, _value(key).shape[1], 1, 1])
        options = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
        attended = _call(graph, aten.scaled_dot_product_attention.default, query, key, value, **options)
        turned = _call(graph, aten.transpose.int, attended, 1, 2)
        node.replace_all_uses_with(_call(graph, aten.contiguous.default, turned))
    graph.erase_node(node)


def _packed(weights: Sequence[Tensor], *, is_gated: bool) -> Tensor:
    return in_blocks(weights, is_gated=is_gated).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


def _is_served(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    dtypes = {part.dtype for part in (rows, weight, bias) if part is not None}
    return dtypes == {torch.bfloat16} and weight.device.type == "cpu" and weight.shape[1] % 2 == 0


def _fuse_gated(graph: Graph, layers: list[Node], layout: _Layout, choice: Choice) -> bool:
    """If the `layers` are gate and up of `silu(gate(x)) * up(x)`, replace this by one operator; else return false."""
    if len(layers) != 2 or layout.has_bias or any(len(layer.users) != 1 for layer in layers):
        return False
    aten = torch.ops.aten
    for gate, up in permutations(layers):
        (silu,), (product,) = gate.users, up.users
        width = _value(gate).shape[-1]
        fits = width == _value(up).shape[-1] and width % (BLOCK // 2) == 0
        is_gated = (silu.target, product.target) == (aten.silu.default, aten.mul.Tensor)
        if is_gated and fits and len(silu.users) == 1 and set(product.args) == {silu, up}:
            break
    else:
        return False
    with graph.inserting_before(product):
        product.replace_all_uses_with(_multiply(graph, [gate, up], choice, is_gated=True))
    for node in (product, silu, gate, up):
        graph.erase_node(node)
    return True


def _library_weight(graph: Graph, weights: list[Argument], choice: Choice) -> Argument:
    """Return a node with all the weights joined, which oneDNN reads; `None` if oneDNN is never used."""
    if choice.library_from == NEVER or len(weights) == 1:
        return None if choice.library_from == NEVER else weights[0]
    return _call(graph, torch.ops.aten.cat.default, weights)


def _join(graph: Graph, layers: list[Node], choice: Choice) -> None:
    """Replace layers with the same input by one operator, inserted before the first layer."""
    with graph.inserting_before(layers[0]):
        joined, start = _multiply(graph, layers, choice, is_gated=False), 0
        for layer in layers:
            stop = start + _value(layer).shape[-1]
            is_whole = len(layers) == 1
            own = joined if is_whole else _call(graph, torch.ops.aten.slice.Tensor, joined, -1, start, stop)
            layer.replace_all_uses_with(own)
            start = stop
    for layer in layers:
        graph.erase_node(layer)


def _multiply(graph: Graph, layers: list[Node], choice: Choice, *, is_gated: bool) -> Node:
    """Insert and return one operator for all layers, or with `is_gated` for `silu(first) * second` without biases."""
    operators, rows = torch.ops.resps, layers[0].args[0]
    width = _value(layers[0]).shape[-1] if is_gated else sum(_value(layer).shape[-1] for layer in layers)
    is_few_bits = layers[0].target is operators.few_bits_linear.default
    columns = list(zip(*(layer.args[1:] for layer in layers), strict=True))  # weights, then further arguments
    biases = columns[3] if is_few_bits else columns[1] if len(columns) > 1 else [None]
    bias = None if biases[0] is None else _call(graph, torch.ops.aten.cat.default, list(biases))
    weights = list(columns[0])
    if is_few_bits:
        kind = layers[0].args[5]
        codes = _call(graph, operators.pack_codes.default, weights, kind, is_gated)
        factors = [
            None if parts[0] is None else _call(graph, operators.pack_factors.default, list(parts), is_gated)
            for parts in columns[1:3]
        ]
        arguments = rows, codes, *factors, bias, width, kind, is_gated, choice.tiles_from
        return _call(graph, operators.packed_few_bits.default, *arguments)
    library = _library_weight(graph, weights, choice)
    if is_gated:
        packed = _call(graph, operators.pack_gated.default, *weights)
        return _call(graph, operators.bf16_gated.default, rows, packed, library, width, *choice)
    packed = _call(graph, operators.pack_linear.default, weights)
    return _call(graph, operators.bf16_linear.default, rows, packed, bias, library, width, *choice)
