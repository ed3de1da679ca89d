"""The recurrent layers of a hybrid target while it verifies trees.

A node's hidden state depends on its ancestors alone as long as attention has the tree's mask and every mixer reads
each path in its order. So inside the mixers, and only there, a tree becomes the batch of its paths. The states are not
written before a path is accepted: then what the convolution and the scan of each mixer read at the accepted nodes
advances them, for all layers at once and without the mixers' projections. Related: STree (arXiv 2505.14969), and "The
Mamba in the Llama" (arXiv 2408.15237), section 4.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import Cache, PreTrainedModel
from transformers.activations import ACT2FN

from ..compat import HAS_RECURRENT_STATES
from ..tree import DraftTree


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
    """

    nodes: Tensor
    places: Tensor
    rows: Tensor

    @classmethod
    def of(cls, tree: DraftTree) -> "TreePaths":
        """Reads the parents, which waits for an accelerator once."""
        rows = [_paths(parents) for parents in tree.parents.tolist()]
        count, depth = max(map(len, rows)), max(len(path) for paths in rows for path in paths)
        order = torch.arange(len(rows), device=tree.parents.device)
        if count == 1:  # chains: nothing moves
            in_order = torch.arange(tree.parents.numel(), device=order.device).view_as(tree.parents)
            return cls(in_order, in_order, order)
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
        return cls(along.view(-1, depth), at.view(len(rows), -1), order.repeat_interleave(count))

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

    def from_rows(self, states: Tensor) -> Tensor:
        """The states `[b, ...]` that the paths start from: `[b * p, ...]`; of chains the very tensor."""
        return states if self.path_count == 1 else states.index_select(0, self.rows.to(states.device))

    def beginning_with(self, path: Tensor) -> Tensor | None:
        """For each row `[b]` a path that begins with its nodes `[b, m]`, of which it may repeat the last; `None` of
        chains: the row's own.
        """
        return None if self.path_count == 1 else self.places.gather(1, path[:, -1:]).squeeze(1) // self.depth


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


class _Steps(NamedTuple):
    """What advances states `[..., k, v]` node by node, `[..., m, any]` each, in float32.

    With rates S <- e^decay S + key (rate (value - key e^decay S)), without S <- e^decay S + key value. Sources: Gated
    Delta Networks (arXiv 2412.06464), equation 10; Transformers are SSMs (arXiv 2405.21060), section 6.
    """

    keys: Tensor
    values: Tensor
    decays: Tensor
    rates: Tensor | None = None

    def of_kept(self, is_kept: Tensor) -> "_Steps":
        """The same, but nodes that are not kept, as `[..., m, 1]` says, change nothing."""
        keys, decays = (part.masked_fill(~is_kept, 0.0) for part in (self.keys, self.decays))
        return self._replace(keys=keys, decays=decays)

    def advance(self, states: Sequence[Tensor]) -> None:
        """Advance the states `[b, heads, k, v]` of several layers in place; the layers are the first dimension here.

        All nodes are one chunk, as in Transformers' own scans, whose outputs are not needed. The states are large, so
        they are not put together.
        """
        decays, values = self.decays.cumsum(-2), self.values
        if self.rates is not None:
            seen = self.keys * decays.exp()
            known = torch.stack([key @ state.float() for key, state in zip(seen, states, strict=True)])
            values = self._corrected(self.rates, known, _overlap(self.keys, self.keys, decays))
        _Updates(self.keys, values, decays).write(states)

    def of_tree(self, state: Tensor, ancestors: Tensor) -> "_Updates":
        """What each node of a tree adds to the state `[b, heads, k, v]` of the text before it.

        Nodes see `ancestors` `[b, 1, n, n]`, see `DraftTree`, which come before them.
        """
        decays, values = ancestors.to(self.decays.dtype) @ self.decays, self.values
        if self.rates is not None:
            known = (self.keys * decays.exp()) @ state.float()
            values = self._corrected(self.rates, known, _overlap(self.keys, self.keys, decays, ancestors))
        return _Updates(self.keys, values, decays)

    def _corrected(self, rates: Tensor, known: Tensor, overlap: Tensor) -> Tensor:
        """The values without what the state, and the nodes that each one sees, hold for its key."""
        wanted = rates * (self.values - known)
        found: Tensor = torch.linalg.solve_triangular(rates * overlap, wanted, upper=False, unitriangular=True)
        return found


class _Updates(NamedTuple):
    """What nodes add to states `[..., k, v]`, `[..., n, any]` each, in float32.

    After a path to the node i they are e^decay_i S + sum of e^(decay_i - decay_j) key_j value_j over the nodes j of
    the path. Related: STree (arXiv 2505.14969), section 4.
    """

    keys: Tensor
    values: Tensor
    decays: Tensor

    def read(self, queries: Tensor, state: Tensor, ancestors: Tensor) -> Tensor:
        """What each node reads of the state `[b, heads, k, v]` after its path, by its query: `[b, heads, n, v]`."""
        of_state = (queries * self.decays.exp()) @ state.float()
        return of_state + _overlap(queries, self.keys, self.decays, ancestors) @ self.values

    def along(self, path: Tensor, is_kept: Tensor) -> "_Updates":
        """Of the nodes on the path `[b, m]`, where those that are not kept change nothing; layers come first here."""
        places = path[None, :, None, :, None]
        keys, values, decays = (part.gather(-2, places.expand(*part.shape[:-2], -1, part.shape[-1])) for part in self)
        return _Updates(keys.masked_fill(~is_kept[:, None, :, None], 0.0), values, decays)

    def write(self, states: Iterable[Tensor]) -> None:
        """Advance the states of several layers in place, where all nodes are one path; layers come first here."""
        whole = self.decays[..., -1:, :]
        keys, fading = (self.keys * (whole - self.decays).exp()).mT, whole.exp().mT
        for key, value, fade, state in zip(keys, self.values, fading, states, strict=True):
            torch.addcmul(key @ value, state, fade, out=state)


def _overlap(left: Tensor, right: Tensor, decays: Tensor, ancestors: Tensor | None = None) -> Tensor:
    """Products of nodes `[..., n, k]` with earlier ones, faded: `[..., n, n]`.

    Without `ancestors` what is above the diagonal may overflow; with them, others' are 0.
    """
    between = decays.unsqueeze(-2) - decays.unsqueeze(-3)  # from node to later node
    if ancestors is not None:
        between = between.masked_fill(~ancestors.unsqueeze(-1), float("-inf"))
    if decays.shape[-1] == 1:
        return (left @ right.mT) * between.squeeze(-1).exp()
    return (left.unsqueeze(-2) * between.exp() * right.unsqueeze(-3)).sum(-1)


class _DeltaRule(NamedTuple):
    """What a gated delta rule, or Kimi's, reads of nodes, `[..., m, heads, any]`; a number per head lacks the last."""

    key: Tensor
    value: Tensor
    gate: Tensor
    rate: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any) -> "_DeltaRule":
        """From the arguments of the scan."""
        return cls(key, value, g, beta)

    @classmethod
    def read_tree(cls, tree: "WholeTree", query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        """Stand for the scan: its output `[b, n, heads, v]`, and the state, which stays."""
        state = tree.recurrence
        updates = cls.of(query, key, value, **keywords).steps().of_tree(state, tree.ancestors)
        tree.note(updates)
        queries = _unit(query, value.shape[-2]).transpose(1, 2) * query.shape[-1] ** -0.5
        output = updates.read(queries, state, tree.ancestors).transpose(1, 2)
        return output.to(query.dtype, memory_format=torch.contiguous_format), state

    def steps(self) -> _Steps:
        values = self.value.float()
        keys = _unit(self.key, values.shape[-2])
        decays = self.gate.float() if self.gate.dim() == keys.dim() else self.gate.float()[..., None]
        return _Steps(*(part.transpose(-3, -2) for part in (keys, values, decays, self.rate.float()[..., None])))


def _unit(parts: Tensor, heads: int) -> Tensor:
    """Of length 1, `[..., m, any heads, k]` for so many heads."""
    found = parts.float()
    found = found * torch.rsqrt((found * found).sum(-1, keepdim=True) + 1e-6)
    return found.repeat_interleave(heads // found.shape[-2], dim=-2)


class _Mamba2(NamedTuple):
    """What a scan of Mamba-2 reads of nodes, `[..., m, heads, any]`; a number per head lacks the last."""

    value: Tensor
    key: Tensor
    time_step: Tensor
    bias: Tensor
    rate: Tensor

    @classmethod
    def of(
        cls, value: Tensor, dt: Tensor, rate: Tensor, key: Tensor, query: Tensor, *, dt_bias: Tensor, **_: Any
    ) -> "_Mamba2":
        """From the arguments of the scan."""
        return cls(value, key, dt, dt_bias.to(dt.dtype).expand_as(dt), rate.expand_as(dt))

    @classmethod
    def read_tree(
        cls,
        tree: "WholeTree",
        value: Tensor,
        dt: Tensor,
        rate: Tensor,
        key: Tensor,
        query: Tensor,
        *,
        D: Tensor | None = None,  # noqa: N803  # Transformers' name
        return_final_states: bool = False,
        **keywords: Any,
    ) -> Any:
        """Stand for the scan, which cuts no time step: its output `[b, n, heads, v]`, and the state, which stays."""
        state, heads = tree.recurrence, value.shape[-2]
        updates = cls.of(value, dt, rate, key, query, **keywords).steps().of_tree(state, tree.ancestors)
        tree.note(updates)
        queries = query.float().repeat_interleave(heads // query.shape[-2], dim=-2).transpose(1, 2)
        inputs, keys, decays = updates
        output = _Updates(keys, inputs, decays).read(queries, state.mT, tree.ancestors).transpose(1, 2)
        output = output if D is None else output + value.float() * D[:, None]
        return (output.contiguous(), state) if return_final_states else output.contiguous()

    def steps(self) -> _Steps:
        """Its states have the values first."""
        time_step = softplus(self.time_step + self.bias).float()[..., None]
        inputs = self.value.float() * time_step
        keys = self.key.float().repeat_interleave(inputs.shape[-2] // self.key.shape[-2], dim=-2)
        parts = (inputs, keys, self.rate.float()[..., None] * time_step)
        return _Steps(*(part.transpose(-3, -2) for part in parts))


# Name in a modelling file -> what notes its arguments, or reads a whole tree in its place.
_SCANS: dict[str, type[_DeltaRule] | type[_Mamba2]] = {
    "torch_chunk_gated_delta_rule": _DeltaRule,
    "chunk_kimi_delta_attention": _DeltaRule,
    "mamba2_chunk_scan": _Mamba2,
}
_CONVOLUTION = "causal_conv1d_fn"


class _NotedScan:
    """Stands for a scan, or for a convolution, while calls decode: notes a scan's arguments for the thread that reads
    the paths of a tree, and lets others read a whole tree.

    Attributes:
        own: the function of the modelling file, or what stood there.
        users: calls that decode with it.
    """

    def __init__(self, own: Callable[..., Any], kind: type[_DeltaRule] | type[_Mamba2] | None) -> None:
        self.own, self.users, self._kind = own, 0, kind

    def __call__(self, *arguments: Any, resps_tree: "WholeTree | None" = None, **keywords: Any) -> Any:
        if resps_tree is not None:
            read = resps_tree.convolved if self._kind is None else partial(self._kind.read_tree, resps_tree)
            return read(*arguments, **keywords)
        reading = None if self._kind is None else _current.get()
        if reading is not None and self._kind is not None:
            reading.note(self._kind.of(*arguments, **keywords))
        return self.own(*arguments, **keywords)


class NotedScans:
    """Has the scans of some mixers noted inside `with`: the names in their modelling files stand for `_NotedScan`.

    Hooks reach modules, and a scan is a function between two projections.

    Args:
        mixers: of one target.
    """

    def __init__(self, mixers: Iterable[Any]) -> None:
        files = {type(mixer).__module__ for mixer in mixers}
        self._places = [(vars(sys.modules[file]), name) for file in files for name in (*_SCANS, _CONVOLUTION)]

    def __enter__(self) -> "NotedScans":
        with _lock:
            for names, name in self._places:
                if name in names:
                    if not isinstance(names[name], _NotedScan):
                        names[name] = _NotedScan(names[name], _SCANS.get(name))
                    names[name].users += 1
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            for names, name in self._places:
                scan = names.get(name)
                if isinstance(scan, _NotedScan):
                    scan.users -= 1
                    if not scan.users:
                        names[name] = scan.own


class _PathStates:
    """Stands for the cache in one mixer that reads all paths of a tree: gives the states and does not change them.

    Attributes:
        convolution: `[b, c, kernel]` the row's state in the cache.
        recurrence: `[b, heads, k, v]` likewise; `None` for a short convolution.
        convolved: `[b * p, c, kernel + d]` that state and what was convolved at the nodes after it.
        scanned: what the scan read at the nodes `[b * p, d]`.
    """

    def __init__(self, cache: Cache, layer_idx: int, paths: TreePaths) -> None:
        states: Any = cache.get_conv_state(layer_idx), cache.get_recurrent_state(layer_idx)
        self.convolution: Tensor = states[0]
        self.recurrence: Tensor | None = states[1]
        self._paths = paths
        self.convolved: Tensor | None = None
        self.scanned: _DeltaRule | _Mamba2 | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self._paths.from_rows(self.convolution)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.recurrence is None else self._paths.from_rows(self.recurrence)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.convolved = torch.cat([self._paths.from_rows(self.convolution), conv_states], dim=-1)
        return self.convolved

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states

    @property
    def kind(self) -> tuple[Any, ...]:
        """What mixers have in common that advance together."""
        return self.convolution.device, self.convolution.shape, tuple(part.shape for part in self.scanned or ())


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
        self._hooks.enter_context(NotedScans(self._mixers.values()))
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
        self._reading = _Reading(TreePaths.of(tree), self._cache)
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
        return reading.enter(mixer, arguments, keywords)

    def _leaving(self, mixer: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        reading = self._reading
        return None if reading is None or _current.get() is not reading else reading.leave(mixer, output)

    def keep(self, path: Tensor) -> None:
        """Advance the states along the accepted path of the newest tree.

        Args:
            path: `[b, m]` node indices, the root first; a row that keeps fewer repeats its last.
        """
        if self._reading is not None:
            self._reading.advance(path)
        self.drop()

    def drop(self) -> None:
        """Forget the newest tree."""
        self._reading = None


class _Reading:
    """A tree as the mixers read it, and what they read."""

    def __init__(self, paths: TreePaths, cache: Cache) -> None:
        self.paths, self._cache = paths, cache
        self._read: list[_PathStates] = []
        self._inside: _PathStates | None = None  # of the mixer that runs

    def enter(
        self, mixer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A mixer gets all paths instead of the nodes that it is given, and the states that they start from."""
        self._inside = _PathStates(self._cache, mixer.layer_idx, self.paths)
        # The nodes are no padding, whatever the prompt is
        keywords = {**keywords, "cache": self._inside, "attention_mask": None}
        states = arguments[0] if arguments else keywords.pop("hidden_states")
        read = self.paths.along(states)
        return (read, *arguments[1:]), keywords | _chunk_keyword(mixer, read)

    def note(self, scanned: _DeltaRule | _Mamba2) -> None:
        """Keep what the scan of the mixer that runs is given."""
        if self._inside is not None:
            self._inside.scanned = scanned

    def leave(self, mixer: Any, output: Tensor) -> Tensor:
        """The output at the nodes.

        Raises:
            ValueError: the mixer computes in another way than its class does.
        """
        read, self._inside = self._inside, None
        if read is None or read.convolved is None or (read.scanned is None) != (read.recurrence is None):
            raise ValueError(
                f"A `{type(mixer).__name__}` read a tree without the scan of its modelling file, so its forward was "
                "replaced. Load the target without kernels for whole layers, or leave out the head and the policy."
            )
        self._read.append(read)
        return self.paths.at_nodes(output)

    def advance(self, path: Tensor) -> None:
        """Advance the states of all mixers along `path` `[b, m]`, outside the target's forward."""
        alike = defaultdict(list)
        for read in self._read:
            alike[read.kind].append(read)
        is_kept = torch.diff(path, prepend=path.new_full((len(path), 1), -1)) != 0
        chosen = self.paths.beginning_with(path)
        for group in alike.values():
            device = group[0].convolution.device
            own = None if chosen is None else chosen.to(device)
            is_cast = torch.is_autocast_enabled(device.type)
            with torch.autocast(device.type, enabled=False) if is_cast else nullcontext():
                _advance(group, own, is_kept.to(device))


def _advance(group: list[_PathStates], chosen: Tensor | None, is_kept: Tensor) -> None:
    """Advance the states of mixers of one kind by the nodes `[b, m]` that are kept of the chosen paths `[b]`."""

    def joined(parts: Iterable[Tensor]) -> Tensor:
        """`[layers, b, ...]` of each layer's `[b * p, ...]`."""
        found = torch.stack(list(parts))
        return found if chosen is None else found.index_select(1, chosen)

    kernel, count = group[0].convolution.shape[-1], is_kept.shape[1]
    convolved = joined(read.convolved for read in group if read.convolved is not None)
    window = is_kept.sum(1, keepdim=True) + torch.arange(kernel, device=is_kept.device)  # [b, kernel]
    kept = convolved.gather(-1, window[:, None].expand(*convolved.shape[:-1], -1))
    for read, state in zip(group, kept, strict=True):
        read.convolution.copy_(state)
    scans = [read.scanned for read in group if read.scanned is not None]
    if scans:
        noted = type(scans[0])(*(joined(parts)[:, :, :count] for parts in zip(*scans, strict=True)))
        steps = noted.steps().of_kept(is_kept[:, None, :, None])
        steps.advance([read.recurrence for read in group if read.recurrence is not None])


# What the forward in this thread reads: two threads may share a target.
_current: ContextVar[_Reading | None] = ContextVar("resps_mixers", default=None)


_REPLACED = (
    ", so its forward was replaced. Load the target without kernels for whole layers, or leave out the head and the "
    "policy."
)


class WholeTree:
    """A tree as mixers read it all at once, in one forward of the target: no node is read twice, and no state changes.

    The forward hands it on to what stands for scans and convolutions, see `NotedScans`, as the keyword `resps_tree`.

    Args:
        depths: `[b, n]`, see `DraftTree`.
        ancestors: `[b, n, n]`, likewise.
        states: layer -> the states of the text before the tree.

    Attributes:
        ancestors: `[b, 1, n, n]` for all heads.
    """

    def __init__(self, depths: Tensor, ancestors: Tensor, states: "dict[int, LayerStates]") -> None:
        self.ancestors, self._depths, self._states = ancestors[:, None], depths, states
        self._inside = -1  # the layer that runs
        self._places: dict[tuple[int, int], Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._updates: dict[int, _Updates] = {}

    def enter(self, layer: int) -> Tensor:
        """A layer begins to read: its state before the convolution."""
        self._inside = layer
        return self._states[layer].convolution

    @property
    def recurrence(self) -> Tensor:
        """The state `[b, heads, k, v]` of the layer that runs."""
        state = self.state(self._inside)
        assert state is not None
        return state

    def state(self, layer: int) -> Tensor | None:
        """The same of any layer; `None` of a short convolution."""
        return self._states[layer].recurrence

    def convolve(self, inputs: Tensor) -> Tensor:
        """Note what is convolved next, `[b, c, n]`."""
        self._inputs[self._inside] = inputs
        return inputs

    def convolved(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        """Stand for the convolution: `[b, c, n]`, of each node with those before it on its path and the state."""
        state = self._states[self._inside].convolution
        places = self._windows(weight.shape[-1], state.shape[-1])  # [b, n, kernel]
        before = torch.cat([state.to(inputs.dtype), inputs], dim=-1)
        windows = before.gather(-1, places.flatten(1)[:, None].expand(-1, before.shape[1], -1))
        products = windows.view(*before.shape[:2], *places.shape[1:]).float() * weight[:, None].float()
        found = products.sum(-1) if bias is None else products.sum(-1) + bias[:, None].float()
        found = found.to(weight.dtype)
        return (found if activation is None else ACT2FN[activation](found)).to(inputs.dtype)

    def _windows(self, kernel: int, size: int) -> Tensor:
        """`[b, n, kernel]` where each node, after the `kernel` - 1 entries before it on its path, lies in a state of
        so many entries and the nodes after it.
        """
        if (kernel, size) not in self._places:
            order = torch.arange(self._depths.shape[1], device=self._depths.device)
            levels = self._depths[..., None] - torch.arange(kernel - 1, -1, -1, device=order.device)  # [b, n, kernel]
            is_there = self.ancestors[:, 0, :, None] & (self._depths[:, None, None] == levels[..., None])
            nodes = (is_there * order).sum(-1)
            self._places[kernel, size] = size + torch.where(levels < 0, levels, nodes)
        return self._places[kernel, size]

    def note(self, updates: _Updates) -> None:
        """Keep what the nodes add to the state of the layer that runs."""
        self._updates[self._inside] = updates

    def noted(self, layer: int) -> list[Tensor]:
        """What advances the states of a layer: `[b, any, n]` that were convolved, and of a scan the `_Updates`.

        Raises:
            ValueError: the mixer computes in another way than its class does.
        """
        if layer not in self._inputs or (self._states[layer].recurrence is not None) != (layer in self._updates):
            raise ValueError(
                f"The recurrent layer {layer} read a tree without the functions of its modelling file{_REPLACED}"
            )
        return [self._inputs[layer], *self._updates.get(layer, ())]


class WholeTreeCache(Cache):
    """The cache in a forward over a whole tree: layers with keys as they are, and the states of `tree`."""

    def __init__(self, layers: list[Any], tree: WholeTree) -> None:
        super().__init__(layers=layers)
        self._tree = tree

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self._tree.enter(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._tree.state(layer_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self._tree.convolve(conv_states)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class LayerStates(NamedTuple):
    """The states of a recurrent layer, for b rows.

    Attributes:
        convolution: `[b, c, kernel]`.
        recurrence: `[b, heads, k, v]`; `None` of a short convolution.
    """

    convolution: Tensor
    recurrence: Tensor | None


class StateKinds:
    """Which recurrent layers of a target have states of the same sizes: these lie in one tensor.

    The tensors are, of each kind of layers in turn, `[layers, b, c, kernel]` and, unless it is a short convolution,
    `[layers, b, heads, k, v]`.

    Args:
        target: whose mixers are known.
        cache: that has read a token or more.

    Raises:
        ValueError: a mixer has left no state there.
    """

    def __init__(self, target: PreTrainedModel, cache: Cache) -> None:
        alike = defaultdict(list)
        for layer in sorted(known_mixers(target)):
            states = _states_in(cache, layer)
            if states.convolution is None:
                raise ValueError(f"The recurrent layer {layer} has kept no state of the prompt{_REPLACED}")
            alike[tuple(None if part is None else (part.shape[1:], part.dtype) for part in states)].append(layer)
        self._kinds = [(layers, kind[1] is not None) for kind, layers in alike.items()]

    @property
    def sizes(self) -> list[str]:
        """Of the tensors: each dimension, where b is that of the rows."""
        return [part for _, is_scanned in self._kinds for part in (".b..", *[".b..."] * is_scanned)]

    def of(self, cache: Cache) -> list[Tensor]:
        """Copies of the states in a cache."""
        found = list[Tensor]()
        for layers, is_scanned in self._kinds:
            states = [_states_in(cache, layer) for layer in layers]
            found.append(torch.stack([part.convolution for part in states]))
            if is_scanned:
                found.append(torch.stack([part.recurrence for part in states if part.recurrence is not None]))
        return found

    def give_back(self, tensors: Sequence[Tensor], cache: Cache, rows: slice) -> None:
        """Let a cache hold copies of the states of some rows."""
        for layer, states in self.by_layer(tensors).items():
            held: Any = cache.layers[layer]
            held.conv_states[0] = states.convolution[rows].clone()
            if states.recurrence is not None:
                held.recurrent_states[0] = states.recurrence[rows].clone()

    def by_layer(self, tensors: Sequence[Tensor]) -> dict[int, LayerStates]:
        """The states of each layer, as views."""
        found: dict[int, LayerStates] = {}  # dynamo knows no `dict[int, LayerStates]()`
        parts = iter(tensors)
        for layers, is_scanned in self._kinds:
            convolutions, recurrences = next(parts), next(parts) if is_scanned else None
            for place, layer in enumerate(layers):
                found[layer] = LayerStates(convolutions[place], None if recurrences is None else recurrences[place])
        return found

    def noted(self, tree: WholeTree) -> list[Tensor]:
        """What a tree has noted, of all layers of each kind together: `[layers, b, ...]`."""
        found: list[Tensor] = []
        for layers, _ in self._kinds:
            found += [torch.stack(part) for part in zip(*[tree.noted(layer) for layer in layers], strict=True)]
        return found

    def advance(self, tensors: Sequence[Tensor], noted: Sequence[Tensor], path: Tensor) -> None:
        """Advance the states in place, along the kept path `[b, m]` of the tree that has noted this.

        A row that keeps fewer nodes repeats its last.
        """
        is_kept = torch.diff(path, prepend=path.new_full((len(path), 1), -1)) != 0
        parts, notes = iter(tensors), iter(noted)
        for _, is_scanned in self._kinds:
            convolution, inputs = next(parts), next(notes)
            kept = inputs.gather(-1, path[None, :, None].expand(*inputs.shape[:-1], -1))
            window = is_kept.sum(1, keepdim=True) + torch.arange(convolution.shape[-1], device=path.device)
            before = torch.cat([convolution, kept.to(convolution.dtype)], dim=-1)
            convolution.copy_(before.gather(-1, window[:, None].expand_as(convolution)))
            if is_scanned:
                updates = _Updates(*(next(notes) for _ in _Updates._fields))
                updates.along(path, is_kept).write(next(parts))


def _states_in(cache: Cache, layer: int) -> LayerStates:
    held: Any = cache.layers[layer]
    return LayerStates(held.conv_states[0], held.recurrent_states[0])
