"""The recurrent layers of a hybrid target while it verifies trees.

A node's hidden state depends on its ancestors alone as long as attention has the tree's mask and every mixer reads
each path in its order. So inside the mixers, and only there, a tree becomes the batch of its paths, from copies of the
row's states. The states themselves are not written before a path is accepted: then each mixer reads its own inputs at
the accepted nodes. Related: STree (arXiv 2505.14969), and "The Mamba in the Llama" (arXiv 2408.15237), section 4.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..tree import DraftTree
from .known_mixers import known_mixers
from .recurrent_states import copied_rows, empty_like, write_back
from .scan_settings import ScanSettings, chunk_keyword
from .tree_paths import TreePaths, gathered


class RecurrentMixers:
    """Reads trees path by path inside the mixers of a target, by hooks that are there inside `with`.

    Args:
        target: any decoder of Transformers; nothing happens where it has no mixers.
        cache: of the call.
    """

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
    """A tree as the mixers read it.

    Attributes:
        paths: of the tree.
        branches: one cache for all mixers, with the states of every path after it was read.
    """

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
        return (read, *arguments[1:]), keywords | chunk_keyword(mixer, read)

    def read_again(self, mixers: dict[int, Any], nodes: Tensor, cache: Cache) -> None:
        """Run the mixers alone over their inputs at `nodes` `[r, m]`, counted through all rows, on the states of
        `cache`; outside the target's forward, so without what wraps it.
        """
        with torch.autocast(**self._autocast) if self._autocast else nullcontext():
            for index, (states, keywords) in self._inputs.items():
                mixer, read = mixers[index], gathered(states, nodes)
                mixer.forward(read, **keywords | chunk_keyword(mixer, read) | {"cache": cache})


# What the forward in this thread reads: two threads may share a target.
_current: ContextVar[_Reading | None] = ContextVar("resps_mixers", default=None)
