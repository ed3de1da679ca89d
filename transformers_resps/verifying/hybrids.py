"""The recurrent layers of a hybrid target while it verifies trees.

A node's hidden state depends on its ancestors alone as long as attention has the tree's mask and every mixer reads
each path in its order. So inside the mixers, and only there, a tree becomes the batch of its paths, from copies of the
row's states. The states themselves are not written before a path is accepted: then each mixer reads its own inputs at
the accepted nodes. Related: STree (arXiv 2505.14969), and "The Mamba in the Llama" (arXiv 2408.15237), section 4.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..compat import HAS_RECURRENT_STATES
from ..tree import DraftTree
from .cache import copied_rows, empty_like, write_back


# Class -> its folder in `transformers.models`. They read several tokens from a given state as one after the other; a
# mixer that is not listed may ignore that state, as some of stock's do.
_MIXERS = {
    "Qwen3NextGatedDeltaNet": "qwen3_next",
    "Qwen3_5GatedDeltaNet": "qwen3_5",
    "Qwen3_5MoeGatedDeltaNet": "qwen3_5_moe",
    "OlmoHybridGatedDeltaNet": "olmo_hybrid",
    "LaraMiniGatedDeltaNet": "lara_mini",
    "KimiLinearDeltaAttention": "kimi_linear",
    "BailingHybridDeltaAttention": "bailing_hybrid",
    "BambaMixer": "bamba",
    "GraniteMoeHybridMambaLayer": "granitemoehybrid",
    "FalconH1Mixer": "falcon_h1",
    "NemotronHMamba2Mixer": "nemotron_h",
    "Zamba2MambaMixer": "zamba2",
    "Lfm2ShortConv": "lfm2",
    "Lfm2MoeShortConv": "lfm2_moe",
    "Lfm3ShortConv": "lfm3",
}

_MAMBA_1 = "has Mamba-1 layers, whose scan of several tokens starts without the state before them"
# model_type -> what it cannot do.
_REFUSED = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": _MAMBA_1,
    "zamba": _MAMBA_1,
    "mamba2": "consists of recurrent layers only, which would run twice for every tree",
    "recurrent_gemma": "keeps its states in the layers, not in a cache, and starts them anew with several tokens",
    "minimax": "takes the length of its cache from a layer that has none, so several tokens get a wrong mask",
    "rwkv": "keeps its states outside a cache of Transformers",
    "xlstm": "keeps its states in a cache of its own",
}

# Kinds of layers, as `config.layer_types` names them, whose state is no list of keys and values.
RECURRENT_KINDS = frozenset(("linear_attention", "conv", "mamba"))
_MIXED_KINDS = frozenset(("hybrid", "hybrid_sliding"))


def layer_kinds(model: PreTrainedModel) -> set[str]:
    """The kinds of the target's layers; empty where its config does not tell them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the target has layers with a state that cannot be taken back."""
    return bool(getattr(model, "_is_stateful", False) or layer_kinds(model) & (RECURRENT_KINDS | _MIXED_KINDS))


def known_mixers(model: nn.Module) -> dict[int, Any]:
    """The mixers that can read paths, by the index of their cache layer."""
    found: list[Any] = [module for module in model.modules() if _is_known(module)]
    return {mixer.layer_idx: mixer for mixer in found}


def recurrence_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a recurrent target cannot verify trees; `None` if it can, or is not recurrent."""
    config = model.config.get_text_config()
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]
    if not is_recurrent(model):
        return None
    if not HAS_RECURRENT_STATES:
        return "has recurrent layers, which need Transformers 5.24 or newer"
    if "hybrid_sliding" in layer_kinds(model):
        return "has layers with a recurrent state and a sliding window in one"
    kinds = getattr(config, "layer_types", None) or ()
    known = known_mixers(model)
    recurrent = [index for index, kind in enumerate(kinds) if kind in RECURRENT_KINDS | _MIXED_KINDS]
    if not recurrent or any(index not in known for index in recurrent):
        return "has recurrent layers of a class that is not known to read several tokens as one after the other"
    if len(recurrent) == len(kinds) and not set(kinds) & _MIXED_KINDS:
        return _REFUSED["mamba2"]
    return None


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    folder = _MIXERS.get(kind.__name__)
    return folder is not None and kind.__module__ == f"transformers.models.{folder}.modeling_{folder}"


@dataclass(frozen=True, slots=True)
class TreePaths:
    """The paths from the root to every leaf, p of them for each row; a row with fewer repeats its last.

    Attributes:
        nodes: `[b * p, d]` nodes of each path, counted through all rows; a short path repeats its last node.
        places: `[b, n]` where each node stands in the flattened paths.
        rows: `[b * p]` the row of each path.
        leaves: of each row, leaf -> its path, from 0 on.
    """

    nodes: Tensor
    places: Tensor
    rows: Tensor
    leaves: list[dict[int, int]]

    @classmethod
    def of(cls, tree: DraftTree) -> "TreePaths":
        """Reads the parents, which waits for an accelerator once."""
        rows = [_paths(parents) for parents in tree.parents.tolist()]
        count, depth = max(map(len, rows)), max(len(path) for paths in rows for path in paths)
        leaves = [{path[-1]: index for index, path in enumerate(paths)} for paths in rows]
        order = torch.arange(len(rows), device=tree.parents.device)
        if count == 1:  # chains: nothing moves
            in_order = torch.arange(tree.parents.numel(), device=order.device).view_as(tree.parents)
            return cls(in_order, in_order, order, leaves)
        nodes, places = list[int](), list[int]()
        for row, paths in enumerate(rows):
            where: dict[int, int] = {}
            for index, path in enumerate(paths, start=row * count):
                for column, node in enumerate(path):
                    where.setdefault(node, index * depth + column)
            places += [where[node] for node in range(tree.node_count)]
            for path in paths + paths[-1:] * (count - len(paths)):
                nodes += [row * tree.node_count + node for node in path + path[-1:] * (depth - len(path))]
        numbers = torch.tensor(nodes + places, device=order.device)  # one copy
        along, at = numbers.split([len(nodes), len(places)])
        return cls(along.view(-1, depth), at.view(len(rows), -1), order.repeat_interleave(count), leaves)

    @property
    def path_count(self) -> int:
        """Paths of each row."""
        return len(self.nodes) // len(self.places)

    @property
    def depth(self) -> int:
        """Nodes of the longest path."""
        return self.nodes.shape[1]

    def along(self, states: Tensor) -> Tensor:
        """The states `[b, n, h]` of all nodes along the paths: `[b * p, d, h]`."""
        return states if self.path_count == 1 else gathered(states, self.nodes)

    def at_nodes(self, states: Tensor) -> Tensor:
        """The states `[b * p, d, h]` of all paths at the nodes: `[b, n, h]`; a node on several is the same in all."""
        return states if self.path_count == 1 else gathered(states, self.places)

    def full_path(self, row: int, nodes: list[int]) -> int | None:
        """The path of all rows that consists of these nodes and was read without repetitions, if there is one."""
        found = self.leaves[row].get(nodes[-1]) if len(nodes) == self.depth else None
        return None if found is None else row * self.path_count + found


def gathered(states: Tensor, order: Tensor) -> Tensor:
    """Of states `[any, any, h]` those at `order` `[a, b]` in the flattened first two dimensions: `[a, b, h]`."""
    found = states.flatten(0, 1).index_select(0, order.flatten().to(states.device))
    return found.view(*order.shape, states.shape[-1])


def _paths(parents: list[int]) -> list[list[int]]:
    """The nodes from the root to each leaf."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    inner = set(parents[1:])
    return [path for node, path in enumerate(paths) if node not in inner]


_NO_LIMIT = (0.0, float("inf"))  # seconds: no step is cut
_reads_tree: ContextVar[bool] = ContextVar("resps_reads_tree", default=False)  # in this thread: others share mixers
_lock = Lock()  # held while settings are lent or given back


def _chunk_keyword(mixer: Any, states: Tensor) -> dict[str, int]:
    """What lets a delta rule without kernels compute the tokens of `states` `[r, m, h]`, and not a chunk of 64.

    The mixer's forward hands it on. An accelerator's kernels are made for long chunks.
    """
    is_fixed = hasattr(mixer, "chunk_size") or states.device.type != "cpu"
    return {} if is_fixed else {"chunk_size": states.shape[1]}


class _TimeStepLimit(Sequence[float]):
    """Stands for a mixer's limit while calls decode with it: none for a thread that reads a tree, its own for others.

    No tuple, whose contents could be read without asking.

    Attributes:
        own: the mixer's, to be given back.
        chunk_size: likewise.
        users: calls that decode with the mixer.
    """

    def __init__(self, mixer: Any) -> None:
        self.own, self.chunk_size, self.users = mixer.time_step_limit, mixer.chunk_size, 0

    def __getitem__(self, index: Any) -> Any:
        return (_NO_LIMIT if _reads_tree.get() or self.own is None else self.own)[index]

    def __len__(self) -> int:
        return len(_NO_LIMIT)


class ScanSettings:
    """The settings of the Mamba-2 mixers among some mixers, lent inside `with`; others have none.

    - `time_step_limit`: several tokens at once have their time steps cut to it, a single token has not. Plain decoding
      reads its own text one token after the other, so a tree must not be cut either.
    - `chunk_size`: without kernels, a chunk of 256 tokens is computed for a tree of four. A short one gives the same.
      A prompt that another thread reads meanwhile takes longer.

    Args:
        mixers: of one target.
    """

    def __init__(self, mixers: Iterable[Any]) -> None:
        self._mixers = [mixer for mixer in mixers if hasattr(mixer, "time_step_limit")]

    def __enter__(self) -> "ScanSettings":
        with _lock:
            for mixer in self._mixers:
                if not isinstance(mixer.time_step_limit, _TimeStepLimit):
                    mixer.time_step_limit = _TimeStepLimit(mixer)
                mixer.time_step_limit.users += 1
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            for mixer in self._mixers:
                limit = mixer.time_step_limit
                limit.users -= 1
                if not limit.users:
                    mixer.time_step_limit, mixer.chunk_size = limit.own, limit.chunk_size

    @contextmanager
    def of_tree(self, depth: int) -> Iterator[None]:
        """Settings for `depth` tokens at once, which go on from a state."""
        token = _reads_tree.set(True)
        try:
            for mixer in self._mixers:
                if mixer.A_log.device.type == "cpu":
                    mixer.chunk_size = min(mixer.time_step_limit.chunk_size, depth)
            yield
        finally:
            for mixer in self._mixers:
                mixer.chunk_size = mixer.time_step_limit.chunk_size
            _reads_tree.reset(token)


class RecurrentMixers:
    """Reads trees path by path inside the mixers of a target, if it has any, by hooks that are there inside `with`."""

    def __init__(self, target: PreTrainedModel, cache: Cache) -> None:
        self._mixers, self._cache = known_mixers(target), cache
        self._settings = ScanSettings(self._mixers.values())
        self._hooks = ExitStack()
        self._reading: _Reading | None = None  # of the newest tree, until it is kept or dropped

    def __bool__(self) -> bool:
        return bool(self._mixers)

    def __enter__(self) -> "RecurrentMixers":
        self._hooks.enter_context(self._settings)
        for mixer in self._mixers.values():
            self._hooks.callback(mixer.register_forward_pre_hook(self._entering, with_kwargs=True).remove)
            self._hooks.callback(mixer.register_forward_hook(self._leaving).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    @contextmanager
    def reading(self, tree: DraftTree) -> Iterator[None]:
        """Let the forward that runs inside read a tree. A lone root advances the states, as in a plain step."""
        self.drop()
        if not self._mixers or tree.node_count == 1:
            yield
            return
        self._reading = _Reading(TreePaths.of(tree), empty_like(self._cache))
        token = _current.set(self._reading)
        try:
            with self._settings.of_tree(self._reading.paths.depth):
                yield
        finally:
            _current.reset(token)

    def _entering(self, mixer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> Any:
        """`keywords` is missing while another thread removes its own hook; the forward is not ours then."""
        reading = self._reading
        if keywords is None or reading is None or _current.get() is not reading:
            return None
        return reading.enter(mixer, self._cache.layers[mixer.layer_idx], arguments, keywords)

    def _leaving(self, mixer: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        reading = self._reading
        return None if reading is None or _current.get() is not reading else reading.paths.at_nodes(output)

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Advance the states along the accepted path of the newest tree.

        Args:
            path: `[b, m]` node indices, the root first; a row that keeps fewer repeats its last.
            paths: the same on the host, without repetitions.
        """
        reading = self._reading
        if reading is not None:
            ends = [reading.paths.full_path(row, nodes) for row, nodes in enumerate(paths)]
            if None in ends:
                with self._settings.of_tree(path.shape[1]):
                    self._read_again(reading, path, list(map(len, paths)))
            else:
                for index in self._mixers:
                    layer, branch = self._cache.layers[index], reading.branches.layers[index]
                    write_back(layer, branch, [(row, end) for row, end in enumerate(ends) if end is not None])
        self.drop()

    def drop(self) -> None:
        """Forget the newest tree."""
        self._reading = None

    def _read_again(self, reading: "_Reading", path: Tensor, counts: list[int]) -> None:
        """Let the mixers read their inputs at the accepted nodes, all rows at once that keep the same number."""
        first = torch.arange(len(path), device=path.device)[:, None] * reading.paths.places.shape[1]
        for count in sorted(set(counts)):
            rows = [row for row, own in enumerate(counts) if own == count]
            nodes = path[:, :count] + first
            if len(rows) == len(counts):
                reading.read_again(self._mixers, nodes, self._cache)
                continue
            order = torch.tensor(rows, device=path.device)
            for index in self._mixers:
                reading.branches.layers[index] = copied_rows(self._cache.layers[index], order)
            reading.read_again(self._mixers, nodes[order], reading.branches)
            for index in self._mixers:
                places = zip(rows, range(len(rows)), strict=True)
                write_back(self._cache.layers[index], reading.branches.layers[index], places)


class _Reading:
    """A tree as the mixers read it; `branches` are one cache with the states of every path after it was read."""

    def __init__(self, paths: TreePaths, branches: Cache) -> None:
        self.paths, self.branches = paths, branches
        self._inputs: dict[int, tuple[Tensor, dict[str, Any]]] = {}  # of each mixer, at the nodes
        self._autocast: dict[str, Any] = {}  # where it was on inside the target's forward

    def enter(
        self, mixer: Any, layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note what a mixer is given; it gets all paths instead, and the states that they start from."""
        # The nodes are no padding, whatever the prompt is
        keywords = {**keywords, "cache": self.branches, "attention_mask": None}
        states = arguments[0] if arguments else keywords.pop("hidden_states")
        self._inputs[mixer.layer_idx] = states, keywords
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            self._autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        self.branches.layers[mixer.layer_idx] = copied_rows(layer, self.paths.rows)
        read = self.paths.along(states)
        return (read, *arguments[1:]), keywords | _chunk_keyword(mixer, read)

    def read_again(self, mixers: dict[int, Any], nodes: Tensor, cache: Cache) -> None:
        """Run the mixers alone over their inputs at `nodes` `[r, m]`, counted through all rows, on the states of
        `cache`; outside the target's forward, so without what wraps it.
        """
        with torch.autocast(**self._autocast) if self._autocast else nullcontext():
            for index, (states, keywords) in self._inputs.items():
                mixer, read = mixers[index], gathered(states, nodes)
                mixer.forward(read, **keywords | _chunk_keyword(mixer, read) | {"cache": cache})


# What the forward in this thread reads: two threads may share a target.
_current: ContextVar[_Reading | None] = ContextVar("resps_mixers", default=None)
