"""Cut an exported program into parts, so that equal parts, such as a decoder's layers, are compiled only once.

Most of the compile time is Python code that visits each node of a graph, and a decoder's graph repeats one layer.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node


_LEAST_EQUAL = 3  # Minimum number of equal parts; with fewer, the whole program compiles as fast.
_NUMBERED = re.compile(r"(.*)\.(\d+)")


class UncuttableError(RuntimeError):
    """A program cannot be cut into parts that run one after the other."""


@dataclass(frozen=True, eq=False)
class ProgramPart:
    """Consecutive nodes of a program's graph, which can be compiled alone."""

    nodes: Sequence[Node]  # first nodes that compute sizes for the part, then its own, in the program's order
    inputs: Sequence[Node]  # inputs of the program and outputs of earlier parts that the nodes use
    weights: Sequence[Node]  # placeholders of the weights that the nodes use
    outputs: Sequence[Node]  # nodes that later parts use or the program returns
    likeness: str  # equal in parts that can run the same code


def parts_of(program: ExportedProgram, together: int = 1) -> list[ProgramPart]:
    """Cut a program into the nodes before its layers, each layer, and the nodes after its layers.

    Up to `together` layers become one part if all equal layers follow one another, since each call of a part costs
    about 10 us. Raises an `UncuttableError` if no layers are equal, or if a layer returns sizes or a tensor in an
    input's memory.
    """
    stretches = [[nodes] for nodes in _stretches(program.graph)]
    parts = _cut(program, stretches)
    ((likeness, count),) = Counter(part.likeness for part in parts).most_common(1)
    if count < _LEAST_EQUAL:
        raise UncuttableError("no layers are equal")
    size = max(size for size in range(1, together + 1) if count % size == 0 and count // size >= _LEAST_EQUAL)
    equal = [place for place, part in enumerate(parts) if part.likeness == likeness]
    end = equal[0] + count
    if size == 1 or equal[-1] >= end:
        return parts
    groups = [[*chain(*stretches[start : start + size])] for start in equal[::size]]
    return _cut(program, [*stretches[: equal[0]], *groups, *stretches[end:]])


def _cut(program: ExportedProgram, groups: Sequence[Sequence[Sequence[Node]]]) -> list[ProgramPart]:
    """Cut a program into one part for each group. A group is a list of stretches: lists of successive nodes.

    A part's outputs are the nodes that other stretches use, also stretches of the same group. Thus groups of equal
    layers get equal parts, although the program itself returns the states after some of these layers.
    """
    weights = set(weight_names(program))
    singles = [_external([*_missing_sizes(nodes), *nodes]) for group in groups for nodes in group]
    needed = {node for nodes in singles for node in nodes} | set(program.graph.output_node().all_input_nodes)
    buffers = {_storage(node) for node in program.graph.find_nodes(op="placeholder") if node.name not in weights}
    parts = []
    for group in groups:
        own = [*chain(*group)]
        nodes = [*_missing_sizes(own), *own]
        outputs = [node for node in own if node in needed]
        if any(not isinstance(node.meta["val"], Tensor) or _storage(node) in buffers for node in outputs):
            raise UncuttableError("a layer hands on sizes, or the memory of an input")
        given = _external(nodes)
        inputs = [node for node in given if node.name not in weights]
        of_weights = [node for node in given if node.name in weights]
        parts.append(ProgramPart(nodes, inputs, of_weights, outputs, _likeness(nodes, inputs, of_weights, outputs)))
    return parts


def exported_part(program: ExportedProgram, part: ProgramPart) -> ExportedProgram:
    """Export one part of `program` as a program of its own, whose weights are named "w0", "w1" and so on.

    Raises an `UncuttableError` if the part cannot be traced alone, for instance if a dynamic size is 1 in the example.
    """
    graph, module, copies = Graph(), nn.Module(), dict[Node, Node]()
    weights, names = {**program.constants, **program.state_dict}, weight_names(program)
    for number, node in enumerate(part.inputs):
        copies[node] = graph.placeholder(f"input_{number}")
    for number, node in enumerate(part.weights):
        module.register_buffer(f"w{number}", weights[names[node.name]].detach())
        copies[node] = graph.get_attr(f"w{number}")
    for node in part.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in part.outputs))
    examples, dynamic = [], []
    for node in part.inputs:
        value = node.meta["val"]
        sizes, strides = (
            [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in sizes]
            for sizes in (value.shape, value.stride())
        )
        changing = [place for place, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        if any(sizes[place] < 2 for place in changing):
            raise UncuttableError("a size that may change is 0 or 1 in the example")
        examples.append(torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_())
        dynamic.append({place: Dim.DYNAMIC for place in changing})
    alone = GraphModule(module, graph)
    try:
        return torch.export.export(alone, tuple(examples), dynamic_shapes=tuple(dynamic), strict=False)
    except RuntimeError as fault:  # `torch.export` raises nothing else.
        raise UncuttableError(f"a part cannot be traced alone: {fault}") from fault


def weight_names(program: ExportedProgram) -> Mapping[str, str]:
    """Map the name of each weight's or constant's placeholder in the graph to the name in the exported module."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _stretches(graph: Graph) -> Iterator[list[Node]]:
    """Yield the nodes before the first layer, the nodes of each layer, and the nodes after the last layer."""
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
    """Return the name of the outermost list of modules in which a node was traced, and the module's index there."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = _NUMBERED.fullmatch(path)
        if match is not None:
            return match[1], int(match[2])
    return None


def _asserts(node: Node) -> bool:
    """Whether a node only checks values. Compiled code omits such nodes."""
    return "_assert" in str(node.target) or "sym_constrain" in str(node.target)


def _external(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes outside `nodes` whose results `nodes` use."""
    inside = set(nodes)
    return list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in inside))


def _missing_sizes(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes outside `nodes` that compute tensor sizes for `nodes`, in the graph's order."""
    inside, found = set(nodes), dict[Node, None]()

    def follow(node: Node) -> None:
        for used in node.all_input_nodes:
            if used not in inside and used not in found and not isinstance(used.meta.get("val"), Tensor):
                follow(used)
                found[used] = None

    for node in nodes:
        follow(node)
    return list(found)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _likeness(nodes: Sequence[Node], inputs: Sequence[Node], weights: Sequence[Node], outputs: Sequence[Node]) -> str:
    """Return a text that describes the computation of nodes. Equal computations have equal texts.

    Sizes that may change are numbered in order of appearance.
    """
    names = {node: f"%{number}" for number, node in enumerate((*inputs, *weights, *nodes))}
    calls = [f"{node.target} {torch.fx.map_arg((node.args, node.kwargs), names.get)}" for node in nodes]
    values, sizes = [node.meta["val"] for node in (*inputs, *weights)], dict[str, str]()

    def named(size: int | torch.SymInt) -> str:
        return sizes.setdefault(str(size), f"s{len(sizes)}") if isinstance(size, torch.SymInt) else str(size)

    kinds = [f"{value.dtype} {[named(size) for size in (*value.shape, *value.stride())]}" for value in values]
    return "\n".join([*kinds, str(len(inputs)), *calls, *(names[node] for node in outputs)])
