"""An exported program in parts, of which equal ones are compiled once: the layers of a decoder are one piece of code.

Most of the time of compiling is Python over each node of a graph, and a decoder's graph is one layer's, over and over.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node


_LEAST_EQUAL = 3  # parts that are equal: with fewer, one piece is as quick
_NUMBERED = re.compile(r"(.*)\.(\d+)")


class UncuttableError(RuntimeError):
    """A program has no parts that can run one after the other."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a program.

    Attributes:
        nodes: in their order.
        inputs: what it reads that is no weight: inputs of the program, and outputs of parts before it.
        weights: the placeholders of the weights that it reads.
        outputs: what later parts read, or the program returns.
        likeness: equal for parts that the same code can serve.
    """

    nodes: Sequence[Node]
    inputs: Sequence[Node]
    weights: Sequence[Node]
    outputs: Sequence[Node]
    likeness: str


def parts_of(program: ExportedProgram) -> list[Part]:
    """The layers of a program one by one, and what stands before and after them.

    Raises:
        UncuttableError: it has no equal layers, or they do not hand on tensors alone.
    """
    graph, weights = program.graph, set(weight_names(program))
    stretches = list(_stretches(graph))
    read = [_read([*_sizes_read(nodes), *nodes]) for nodes in stretches]
    needed = {node for nodes in read for node in nodes} | set(graph.output_node().all_input_nodes)
    buffers = {_storage(node) for node in graph.find_nodes(op="placeholder") if node.name not in weights}
    parts = []
    for nodes, external in zip(stretches, read, strict=True):
        outputs = [node for node in nodes if node in needed]
        if any(not isinstance(node.meta["val"], Tensor) or _storage(node) in buffers for node in outputs):
            raise UncuttableError("a layer hands on sizes, or the memory of an input")
        inputs = [node for node in external if node.name not in weights]
        own = [node for node in external if node.name in weights]
        own_nodes = [*_sizes_read(nodes), *nodes]
        parts.append(Part(own_nodes, inputs, own, outputs, _likeness(own_nodes, inputs, own, outputs)))
    if max(Counter(part.likeness for part in parts).values()) < _LEAST_EQUAL:
        raise UncuttableError("no layers are equal")
    return parts


def exported_part(program: ExportedProgram, part: Part) -> ExportedProgram:
    """A part as a program of its own, whose weights are called by their numbers.

    Raises:
        UncuttableError: it cannot be traced alone, for instance where a size that may change is 1 in the example.
    """
    graph, module, copies = Graph(), nn.Module(), dict[Node, Node]()
    for number, node in enumerate(part.inputs):
        copies[node] = graph.placeholder(f"input_{number}")
    for number, node in enumerate(part.weights):
        weight = _weight_of(program, node)
        module.register_buffer(f"w{number}", weight)
        copies[node] = graph.get_attr(f"w{number}")
    for node in part.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in part.outputs))
    examples, dynamic = [], []
    for node in part.inputs:
        value = node.meta["val"]
        sizes, strides = ([_hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
        changing = [place for place, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        if any(sizes[place] < 2 for place in changing):
            raise UncuttableError("a size that may change is 0 or 1 in the example")
        examples.append(torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_())
        dynamic.append({place: Dim.DYNAMIC for place in changing})
    alone, shapes = _Numbered(GraphModule(module, graph)), (tuple(dynamic),)
    try:
        return torch.export.export(alone, tuple(examples), dynamic_shapes=shapes, strict=False)
    except RuntimeError as fault:  # which those of `torch.export` are
        raise UncuttableError(f"a part cannot be traced alone: {fault}") from fault


class _Numbered(nn.Module):
    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


def weight_names(program: ExportedProgram) -> Mapping[str, str]:
    """The placeholder of each weight and constant -> its name in the module."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _weight_of(program: ExportedProgram, placeholder: Node) -> Tensor:
    name = weight_names(program)[placeholder.name]
    weight: Tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
    return weight.detach()


def _stretches(graph: Graph) -> Iterator[list[Node]]:
    """The nodes before the first layer, those of each layer, and those after the last."""
    numbered = [(node, _layer_of(node)) for node in graph.nodes if node.op == "call_function" and not _asserts(node)]
    lists = Counter(name for name, _ in {layer for _, layer in numbered if layer is not None})
    if not lists:
        raise UncuttableError("it has no list of layers")
    ((name, _),) = lists.most_common(1)
    of_list = [layer[1] if layer is not None and layer[0] == name else None for _, layer in numbered]
    seen = dict[int, int]()
    for place, number in enumerate(of_list):
        if number is not None:
            seen.setdefault(number, place)
    end = 1 + max(place for place, number in enumerate(of_list) if number is not None)
    for start, stop in pairwise([0, *seen.values(), end, len(numbered)]):
        if start < stop:
            yield [node for node, _ in numbered[start:stop]]


def _layer_of(node: Node) -> tuple[str, int] | None:
    """The outermost list of modules in which a node was traced, and its place there."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = _NUMBERED.fullmatch(path)
        if match is not None:
            return match[1], int(match[2])
    return None


def _asserts(node: Node) -> bool:
    """Whether it only checks, as calls of compiled code do not."""
    return "_assert" in str(node.target) or "sym_constrain" in str(node.target)


def _read(nodes: Sequence[Node]) -> list[Node]:
    """What nodes read of others."""
    inside = set(nodes)
    return list(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in inside))


def _sizes_read(nodes: Sequence[Node]) -> list[Node]:
    """What computes the sizes that a stretch reads and does not compute itself, in order."""
    inside, found = set(nodes), dict[Node, None]()

    def follow(node: Node) -> None:
        for read in node.all_input_nodes:
            if read not in inside and read not in found and not isinstance(read.meta.get("val"), Tensor):
                follow(read)
                found[read] = None

    for node in nodes:
        follow(node)
    return list(found)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _likeness(nodes: Sequence[Node], inputs: Sequence[Node], weights: Sequence[Node], outputs: Sequence[Node]) -> str:
    """What it computes, in words: sizes that may change are named in the order in which they come."""
    names = {node: f"%{number}" for number, node in enumerate((*inputs, *weights, *nodes))}
    calls = [f"{node.target} {torch.fx.map_arg((node.args, node.kwargs), names.get)}" for node in nodes]
    values, sizes = [node.meta["val"] for node in (*inputs, *weights)], dict[str, str]()

    def named(size: Any) -> str:
        return sizes.setdefault(str(size), f"s{len(sizes)}") if isinstance(size, torch.SymInt) else str(size)

    kinds = [f"{value.dtype} {[named(size) for size in (*value.shape, *value.stride())]}" for value in values]
    return "\n".join([*kinds, str(len(inputs)), *calls, *(names[node] for node in outputs)])


def _hint(size: Any) -> int:
    """Of the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
