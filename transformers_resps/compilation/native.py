"""Linear layers, attention and decoder layers for packaged code, on CPUs with AVX512-BF16, with AMX or without.

oneDNN reads weights as fast, but each call takes about 20 us more if other work has emptied the caches: in all, a
sixth of SmolLM2's step. PyTorch's attention multiplies in float32, and takes two to four times as long. A
decoder layer of the usual kind (RMSNorm before, rotary embedding, gated MLP with SiLU) is one operator for one text:
its threads start once and meet at barriers.
`native.cpp` is linked into the code that calls it. With its kernels, the result of a row does not depend on other
rows, not even in its last bits. `kernels.py` chooses the kernel for each number of rows.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import Argument
from torch.nn import functional

from .few_bits import BLOCK, Codes, in_blocks, rounding
from .kernels import (
    NEVER,
    Choice,
    Kernels,
    Products,
    chosen_kernels,
    few_bits_kernel,
    native_source,
    our_kernels,
    reads_few_bits,
)


_STEP = 32  # Our attention needs heads whose width is a multiple of this.
_STEP_ROWS = 16  # A decoder layer does not become one operator if oneDNN multiplies this few rows.
_DECLARED = re.compile(r"^AOTITorchError aoti_torch_cpu_([a-z]\w+)\([^)]*\)(?= {)", re.MULTILINE)
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

    `packed` is made by `pack_linear` from weights with i inputs; `bias` is `[width]`. From `tiles_from` rows on,
    AMX tiles multiply; from `library_from` rows on oneDNN does, which reads `weight` `[width, i]`. `NEVER` excludes
    either, and without oneDNN `weight` is `None`.
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


@torch.library.custom_op(
    "resps::bf16_layer", mutates_args=("keys", "values"), tags=(torch.Tag.needs_fixed_stride_order,)
)
def bf16_layer(
    rows: Tensor,
    cosines: Tensor,
    sines: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    groups: Sequence[Tensor],
    norms: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    bias: Tensor | None,
    kinds: Sequence[int],
    heads: int,
    epsilon: float,
    last_epsilon: float,
    scale: float,
    tiles_from: int,
    attention_tiles_from: int,
) -> Tensor:
    """Compute a decoder layer for the rows `[1, n, width]` of one text; only packaged code calls this.

    Args:
        rows: `x`; the result is `y + mlp(norm(y))` with `y = x + attention(norm(x))`.
        cosines: `[1, n, hd]` of the rotary embedding.
        sines: like `cosines`.
        slots: `[n]` the place of each row in `keys` and `values`.
        keys: `[1, kv heads, t, hd]`; those of the rows are written.
        values: like `keys`.
        mask: `[1, 1, n, t or fewer]`, added to the scores; with `groups` that of `bf16_block_attention`.
        groups: nothing, or nodes and slots of `bf16_block_attention`.
        norms: weights of both RMSNorms.
        weights: packed weights of queries (their rows, and those of keys, in the order of `_paired`), keys and values;
            of the output; of gate and up; and of down.
        factors: the packed scales of weights in few bits, then their offsets.
        bias: of queries, keys and values, in their own order.
        kinds: for each weight its `Codes`, or -1 for bf16.
        heads: number of query heads.
        epsilon: of the first norm.
        last_epsilon: of the second norm.
        scale: factor of the scores.
        tiles_from: see `Choice`.
        attention_tiles_from: as in `bf16_attention`.
    """
    raise NotImplementedError("native.cpp has the only implementation")


@bf16_layer.register_fake
def _(rows: Tensor, *_: object) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def native_operators() -> Mapping[_Operator, list[str]]:
    """Map our operators to declarations of their functions in `native.cpp`."""
    declared = _DECLARED.finditer(native_source())
    return {getattr(torch.ops.resps, found[1]).default: [" ".join(found[0].split()) + ";"] for found in declared}


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
    weights = [
        _value(layer.args[1]) for (_, layout), layers in by_input.items() if layout.kind is None for layer in layers
    ]
    states = [[_value(part) for part in node.args[:2]] for node in _attending(graph)]
    heads = tuple((query.shape[1], key.shape[1], query.shape[3]) for query, key in states)
    products = Products(tuple((weight.shape[1], weight.shape[0]) for weight in weights), heads)
    kernels = chosen_kernels(products, alike=alike)
    if kernels.attention.library_from > 1:
        for layer in _decoder_layers(program):
            if layer is not None:
                _replace_layer(graph, layer, kernels)
        by_input = _layers(program)
    for node in _attending(graph):
        _choose_attention(graph, node, kernels.attention)
    for (_, layout), layers in by_input.items():
        choice = kernels.linear if layout.kind is None else few_bits_kernel()
        if choice.library_from > 1 and not _fuse_gated(graph, layers, layout, choice):
            _join(graph, layers, choice)
    program.graph_module.recompile()
    return kernels


def has_usual_layers(program: ExportedProgram) -> bool:
    """Whether `bf16_layer` can compute every layer with attention; compiling such layers takes almost no time."""
    layers = [*_decoder_layers(program)]
    return bool(layers) and None not in layers


def _attending(graph: Graph) -> list[Node]:
    """Return the nodes of our attention operators."""
    operators = torch.ops.resps.bf16_attention.default, torch.ops.resps.bf16_block_attention.default
    return [node for operator in operators for node in graph.find_nodes(op="call_function", target=operator)]


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
    """Round the weights of linear layers to `bits` in the program: bf16 weights, and for 4 bits int8 weights, too."""
    graph, operators = program.graph, torch.ops.resps
    first = next(node for node in graph.nodes if node.op != "placeholder")  # joined layers read all weights there
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
        kind, groups = rounding(_value(weight), bits)
        parts = list[Node]()
        for operator in (operators.rounded_codes.default, operators.rounding_scales.default):
            with graph.inserting_before(first):
                parts.append(_call(graph, operator, weight, int(kind), groups))
            parts[-1].meta["val"] = operator(_value(weight), kind, groups)
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
    pairs = in_blocks(weights, is_gated=is_gated).unflatten(2, (-1, 2)).transpose(1, 2)
    return pairs.clone(memory_format=torch.contiguous_format)


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
    packed, factors, bias, kind = _packed_layers(graph, layers, is_gated=is_gated)
    if kind >= 0:
        arguments = rows, packed, *factors, bias, width, kind, is_gated, choice.tiles_from
        return _call(graph, operators.packed_few_bits.default, *arguments)
    library, *others = [layer.args[1] for layer in layers]
    if choice.library_from == NEVER:
        library = None
    elif others:
        library = _call(graph, torch.ops.aten.cat.default, [library, *others])
    if is_gated:
        return _call(graph, operators.bf16_gated.default, rows, packed, library, width, *choice)
    return _call(graph, operators.bf16_linear.default, rows, packed, bias, library, width, *choice)


class _Packed(NamedTuple):
    weight: Node
    factors: list[Node | None]  # scales and offsets; two `None` for bf16
    bias: Node | None
    kind: int  # of the `Codes`; -1 for bf16


def _packed_layers(graph: Graph, layers: list[Node], *, is_gated: bool, head: int = 0) -> _Packed:
    """Insert operators that pack layers' weights; with `head`, a head's width, the first two weights are `_paired`."""
    operators = torch.ops.resps
    is_few_bits = layers[0].target is operators.few_bits_linear.default
    columns = list(zip(*(layer.args[1:] for layer in layers), strict=True))  # weights, then further arguments
    biases = columns[3] if is_few_bits else columns[1] if len(columns) > 1 else [None]
    bias = None if biases[0] is None else _call(graph, torch.ops.aten.cat.default, list(biases))
    kind = layers[0].args[5] if is_few_bits else -1
    assert isinstance(kind, int)
    weights, *factors = (
        [_paired(graph, part, head) if head and place < 2 else part for place, part in enumerate(parts)]
        for parts in (columns[:3] if is_few_bits else columns[:1])
        if parts[0] is not None
    )
    if is_few_bits:
        codes = _call(graph, operators.pack_codes.default, weights, kind, is_gated)
        made = [_call(graph, operators.pack_factors.default, parts, is_gated) for parts in factors]
        return _Packed(codes, [*made, None][:2], bias, kind)
    if is_gated:
        return _Packed(_call(graph, operators.pack_gated.default, *weights), [None, None], bias, kind)
    return _Packed(_call(graph, operators.pack_linear.default, weights), [None, None], bias, kind)


class _Layer(NamedTuple):
    """The nodes of a decoder layer that `bf16_layer` can replace, and the arguments for it."""

    read: dict[Node, None]  # its nodes
    checks: dict[Node, None]  # nodes that only check its values
    end: Node  # gives the result
    attention: Node
    linear: list[Node]  # of queries, keys and values, the output, gate and up, and down
    tensors: list[Argument]  # the first arguments of `bf16_layer`, up to `norms`
    slots: tuple[Argument, ...]  # arguments of the node that gives the slots
    sizes: list[Argument]  # `heads`, `epsilon`, `last_epsilon` and `scale`


class _OtherLayerError(Exception):
    """A decoder layer is not of the kind that `bf16_layer` computes."""


def _only(nodes: Iterable[Node]) -> Node:
    node, *others = nodes
    _expect(not others)
    return node


def _expect(holds: object) -> None:
    if not holds:
        raise _OtherLayerError


class _LayerReader:
    """Matches the nodes of a decoder layer, each before its inputs, and records them in `read`.

    `served` are the linear layers that our operators can replace. A node that does not match raises an error.
    """

    def __init__(self, served: Collection[Node]) -> None:
        self.read: dict[Node, None] = {}
        self._served = served

    def call(self, node: Any, operator: _Operator | None = None) -> tuple[Any, ...]:
        """Record a node that calls `operator` (`None`: any operator), and return its arguments."""
        _expect(isinstance(node, Node) and operator in (None, node.target) and not node.kwargs)
        self.read[node] = None
        return node.args

    def linear(self, node: Any) -> tuple[Any, Node]:
        """Match a linear layer; return its input and its node."""
        _expect(node in self._served)
        return self.call(node)[0], node

    def norm(self, node: Any) -> tuple[Any, Any, Any]:
        """Match the nodes of an RMSNorm; return its input, weight and epsilon."""
        aten = torch.ops.aten
        weight, rounded = self.call(node, aten.mul.Tensor)
        scaled, *narrow = self.call(rounded, aten.to.dtype)
        wide, root = self.call(scaled, aten.mul.Tensor)
        mean, epsilon = self.call(self.call(root, aten.rsqrt.default)[0], aten.add.Tensor)
        squares, *along = self.call(mean, aten.mean.dim)
        base, power = self.call(squares, aten.pow.Tensor_Scalar)
        rows, *dtype = self.call(wide, aten.to.dtype)
        _expect(base is wide and (along, power) == ([[-1], True], 2) and isinstance(epsilon, float))
        _expect((narrow, dtype) == ([torch.bfloat16], [torch.float32]))
        _expect(_value(rows).dtype is _value(weight).dtype is torch.bfloat16 and _value(weight).dim() == 1)
        return rows, weight, epsilon

    def rotated(self, node: Any) -> tuple[Any, list[Any]]:
        """Match the nodes of a rotary embedding; return its input, and its cosines and sines."""
        aten = torch.ops.aten
        straight, across = self.call(node, aten.add.Tensor)
        states, cosines = self.call(straight, aten.mul.Tensor)
        swapped, sines = self.call(across, aten.mul.Tensor)
        halves, *along = self.call(swapped, aten.cat.default)
        last, *second = self.call(self.call(halves[0], aten.neg.default)[0], aten.slice.Tensor)
        start, *first = self.call(halves[1], aten.slice.Tensor)
        width = _value(states).shape[-1]
        _expect(last is states and start is states and len(halves) == 2 and along == [-1])
        _expect(first == [3, 0, width // 2] and second[:2] == [3, width // 2] and second[2] >= width)
        parts = [self.call(part, aten.unsqueeze.default) for part in (cosines, sines)]
        _expect(all(place == 1 and _value(part).shape[2:] == (width,) for part, place in parts))
        return states, [part for part, _ in parts]

    def heads(self, node: Any) -> tuple[Any, Node]:
        """Match states `[1, heads, n, hd]`; return the input and the node of the linear layer that makes them."""
        split, *swapped = self.call(node, torch.ops.aten.transpose.int)
        states, shape = self.call(split, torch.ops.aten.view.default)
        _expect(swapped == [1, 2] and len(shape) == 4 and shape[0] == 1)
        return self.linear(states)

    def kept(self, node: Any) -> tuple[Any, tuple[Any, ...], Any]:
        """Match a write to a cache buffer; return the buffer, the arguments that select its slots, and the states."""
        aten = torch.ops.aten
        if node.target is aten.slice.Tensor:
            node, *part = self.call(node, node.target)
            _expect(part[0] == 2 and part[1] in (None, 0))
        buffer, along, slots, states = self.call(node, aten.index_copy_.default)
        _expect(along == 2 and buffer.op == "placeholder")
        return buffer, self.call(slots, aten.select.int), states

    def layer(self, attention: Node) -> _Layer:
        """Match and return the decoder layer around an attention operator."""
        aten = torch.ops.aten
        takes_blocks = attention.target is torch.ops.resps.bf16_block_attention.default
        query, key, value, mask, *groups, scale = self.call(attention)[: 8 if takes_blocks else 5]
        if groups:
            _expect(groups.pop() is None)  # sinks
        middle = attention
        while middle.target is not aten.add.Tensor:
            middle = _only(middle.users)
        end = _only(user for user in middle.users if user.target is aten.add.Tensor)
        (between, written), (rows, attended) = (self.call(node, aten.add.Tensor) for node in (end, middle))
        gated, down = self.linear(written)
        sides = self.call(gated, aten.mul.Tensor)
        silu, product = sorted(sides, key=lambda node: node.target is not aten.silu.default)
        (normed, gate), (other, up) = self.linear(self.call(silu, aten.silu.default)[0]), self.linear(product)
        last_rows, *last_norm = self.norm(normed)
        flat, output = self.linear(attended)
        states, shape = self.call(flat, aten.reshape.default)
        if states is not attention:  # swapped twice
            states, *swapped = self.call(states, aten.transpose.int)
            states, *again = self.call(states, aten.transpose.int)
            _expect(swapped == again == [1, 2])
        queries, angles = self.rotated(query)
        keys, slots, new_keys = self.kept(key)
        values, value_slots, new_values = self.kept(value)
        unrotated, key_angles = self.rotated(new_keys)
        made = [self.heads(part) for part in (queries, unrotated, new_values)]
        first, *norm = self.norm(made[0][0])
        _expect(states is attention and len(shape) == 3 and shape[0] == 1 and shape[2] == -1)
        _expect(between is last_rows is middle and other is normed and first is rows and slots == value_slots)
        _expect(all(part[0] is made[0][0] for part in made) and angles == key_angles and slots[1:] == (0, 0))
        sizes = _value(rows).shape[0], *_value(mask).shape[:2]
        _expect(all(isinstance(size, int) and size == 1 for size in sizes))
        _expect(_value(query).shape[3] == _value(value).shape[3] and _value(slots[0]).dtype is torch.int64)
        users = {user: None for node in self.read for user in node.users if node is not end and user not in self.read}
        _expect(all(user.target is aten._assert_tensor_metadata.default for user in users))
        others = {user for buffer in (keys, values) for user in buffer.users if user not in self.read}
        _expect(all(user.target is aten.sym_size.int for user in others))
        tensors = [rows, *angles, keys, values, mask, groups, [norm[0], last_norm[0]]]
        linear = [*(node for _, node in made), output, gate, up, down]
        heads = _value(query).shape[1]
        return _Layer(self.read, users, end, attention, linear, tensors, slots, [heads, norm[1], last_norm[1], scale])


def _decoder_layers(program: ExportedProgram) -> Iterator[_Layer | None]:
    """Return an iterator of `_decoder_layer` for each attention; earlier layers may be replaced in the meantime."""
    layouts = {node: layout for (_, layout), nodes in _layers(program).items() for node in nodes}
    return (_decoder_layer(attention, layouts) for attention in _attending(program.graph))


def _decoder_layer(attention: Node, layouts: Mapping[Node, _Layout]) -> _Layer | None:
    """Return the layer around `attention`; `None` if `bf16_layer` cannot replace it. `layouts`: of linear layers."""
    try:
        layer = _LayerReader(layouts).layer(attention)
    except (_OtherLayerError, ValueError, AttributeError, TypeError, IndexError):  # arguments of other kinds
        return None
    query, key, value, output, gate, up, down = (layouts[node] for node in layer.linear)
    alike = {(layout.kind is None, layout.has_offsets) for layout in (query, output, gate, down)}
    has_bias = any(layout.has_bias for layout in (output, gate, down))
    width = _value(layer.linear[4]).shape[-1]
    fits = query == key == value and gate == up and len(alike) == 1 and not has_bias and width % (BLOCK // 2) == 0
    return layer if fits else None


def _replace_layer(graph: Graph, layer: _Layer, kernels: Kernels) -> None:
    """Replace the nodes of a decoder layer by `bf16_layer`, unless oneDNN is faster for few rows."""
    is_few_bits = layer.linear[0].target is torch.ops.resps.few_bits_linear.default
    choice = few_bits_kernel() if is_few_bits else kernels.linear
    if choice.library_from <= _STEP_ROWS:
        return
    query, key, value, output, gate, up, down = layer.linear
    head = _value(layer.attention.args[0]).shape[3]
    with graph.inserting_before(layer.end):
        packed = [
            _packed_layers(graph, [query, key, value], is_gated=False, head=head),
            _packed_layers(graph, [output], is_gated=False),
            _packed_layers(graph, [gate, up], is_gated=True),
            _packed_layers(graph, [down], is_gated=False),
        ]
        weights, factors, biases, kinds = zip(*packed, strict=True)
        tensors = [*layer.tensors[:3], _call(graph, torch.ops.aten.select.int, *layer.slots), *layer.tensors[3:]]
        parts = [part for column in zip(*factors, strict=True) for part in column if part is not None]
        arguments = *tensors, [*weights], parts, biases[0], [*kinds], *layer.sizes, choice.tiles_from
        made = _call(graph, torch.ops.resps.bf16_layer.default, *arguments, kernels.attention.tiles_from)
    made.meta["val"] = _value(layer.end)
    layer.end.replace_all_uses_with(made)
    for node in reversed(graph.nodes):
        if node in layer.read or node in layer.checks:
            graph.erase_node(node)


def _paired(graph: Graph, part: Argument, head: int) -> Node:
    """Reorder a matrix `[outputs, n]` for rotation: 16 rows of a head's first half, 16 of its second, and so on."""
    aten, (outputs, width) = torch.ops.aten, _value(part).shape
    split = _call(graph, aten.reshape.default, part, [-1, 2, head // BLOCK, BLOCK // 2, width])
    return _call(graph, aten.reshape.default, _call(graph, aten.transpose.int, split, 1, 2), [outputs, width])
