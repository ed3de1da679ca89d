"""Verify trees with hybrid targets, whose recurrent layers (mixers) keep a state.

In a mixer, tokens affect each other only through its convolution and its scan. For a tree, functions of this module
replace both: they compute all paths at once without changing a state, and store the values by which each node would
change it. When a path is accepted, these values update the states of all layers, without running the mixers again.
Related: STree (arXiv 2505.14969), and "The Mamba in the Llama" (arXiv 2408.15237), section 4.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import Cache, PreTrainedModel
from transformers.activations import ACT2FN

from ..compat import CACHE_KEYWORD, HAS_RECURRENT_STATES
from ..tree import DraftTree
from .lending import Change, lent
from .masks import HYBRID_TYPES, RECURRENT_TYPES, layer_types


# Class of a supported mixer -> its folder in `transformers.models`. These mixers continue from a given state with
# several tokens, and pass a forward's keywords on to convolution and scan. Other mixers may ignore the state.
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
# model_type -> why it cannot verify trees.
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

_STATEFUL_TYPES = RECURRENT_TYPES | HYBRID_TYPES.keys()


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the target has recurrent layers, whose state cannot be rolled back.

    Since Transformers 5.25 only layer types tell it.
    """
    return bool(getattr(model, "_is_stateful", False) or layer_types(model) & _STATEFUL_TYPES)


def known_mixers(model: nn.Module) -> dict[int, nn.Module]:
    """Map each recurrent layer's index to its mixer (such as Mamba's), if that mixer's class supports trees."""
    found, modules = dict[int, nn.Module](), list[Any](model.modules())
    for module in modules:
        folder = _MIXERS.get(type(module).__name__)
        if type(module).__module__ == f"transformers.models.{folder}.modeling_{folder}":
            found[module.layer_idx] = module
    return found


def recurrence_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a recurrent target cannot verify trees; `None` if it can, or is not recurrent."""
    config = model.config.get_text_config()
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]
    if not is_recurrent(model):
        return None
    if not HAS_RECURRENT_STATES:
        return "has recurrent layers, which need Transformers 5.24 or newer"
    if "hybrid_sliding" in layer_types(model):
        return "has layers with a recurrent state and a sliding window in one"
    types = getattr(config, "layer_types", None) or ()
    known = known_mixers(model)
    recurrent = [index for index, name in enumerate(types) if name in _STATEFUL_TYPES]
    if not recurrent or any(index not in known for index in recurrent):
        return "has recurrent layers of a class that is not known to read several tokens as one after the other"
    if len(recurrent) == len(types) and not set(types) & HYBRID_TYPES.keys():
        return _REFUSED["mamba2"]
    return None


class LayerStates(NamedTuple):
    """The states of one recurrent layer with c channels; k and v are the widths of a head's keys and values."""

    convolution: Tensor  # [b, c, kernel]
    recurrence: Tensor | None  # [b, heads, k, v]; `None` for a short convolution


class _Updates(NamedTuple):
    """The changes that n nodes make to a state S `[..., k, v]`: keys, values and decays `[..., n, any]` in float32.

    After the path to node i the state is e^decay_i S + sum of e^(decay_i - decay_j) key_j value_j over the path's
    nodes j. Related: STree (arXiv 2505.14969), section 4.
    """

    keys: Tensor
    values: Tensor
    decays: Tensor

    def advance(self, states: Iterable[Tensor], path: Tensor, is_kept: Tensor) -> None:
        """Advance each layer's state in place by the nodes of `path` `[b, m]` for which `is_kept` `[b, m]` is true."""
        index = path[None, :, None, :, None]
        keys, values, decays = (part.gather(-2, index.expand(*part.shape[:-2], -1, part.shape[-1])) for part in self)
        keys, whole = keys.masked_fill(~is_kept[:, None, :, None], 0.0), decays[..., -1:, :]
        keys, fading = (keys * (whole - decays).exp()).mT, whole.exp().mT
        for key, value, fade, state in zip(keys, values, fading, states, strict=True):  # one by one: they are large
            torch.addcmul(key @ value, state, fade, out=state)


_REPLACED = (
    ", so its forward was replaced. Load the target without kernels for whole layers, or leave out the head and the "
    "policy."
)


class WholeTree:
    """Computes a tree in the recurrent layers during one forward of the target, without changing their states.

    The functions that replace scans and convolutions get this object as `resps_tree`; see `_TreeReader`. `depths`
    `[b, n]` and `ancestors` `[b, n, n]` are a `DraftTree`'s; `states` holds each layer's states before the tree.
    """

    def __init__(self, depths: Tensor, ancestors: Tensor, states: Mapping[int, LayerStates]) -> None:
        self._depths, self._states = depths, states
        self._ancestors = ancestors[:, None]  # for all heads
        self._inside = -1  # the layer that runs
        self._places: dict[tuple[int, int], Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._updates: dict[int, _Updates] = {}

    def enter(self, layer: int) -> Tensor:
        """Remember which layer runs now, and return its convolution state."""
        self._inside, state = layer, self._states[layer].convolution
        if state.device != self._depths.device:  # layers lie on several devices
            self._ancestors, self._depths = (part.to(state.device) for part in (self._ancestors, self._depths))
            self._places = {}
        return state

    def state(self, layer: int) -> Tensor | None:
        return self._states[layer].recurrence

    @property
    def _recurrence(self) -> Tensor:
        state = self.state(self._inside)
        assert state is not None
        return state

    def convolve(self, inputs: Tensor) -> Tensor:
        """Store the input `[b, c, n]` of the running layer's convolution, and return it."""
        self._inputs[self._inside] = inputs
        return inputs

    def convolved(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        """Compute each node's convolution over its path and the state before the root: `[b, c, n]`."""
        state = self._states[self._inside].convolution
        index = self._windows(weight.shape[-1], state.shape[-1])  # [b, n, kernel]
        before = torch.cat([state.to(inputs.dtype), inputs], dim=-1)
        windows = before.gather(-1, index.flatten(1)[:, None].expand(-1, before.shape[1], -1))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        products = windows.view(*before.shape[:2], *index.shape[1:]).to(dtype) * weight[:, None].to(dtype)
        convolved = products.sum(-1) if bias is None else products.sum(-1) + bias[:, None].to(dtype)
        convolved = convolved.to(weight.dtype)
        return (convolved if activation is None else ACT2FN[activation](convolved)).to(inputs.dtype)

    def _windows(self, kernel: int, size: int) -> Tensor:
        """Return indices `[b, n, kernel]` of each node's convolution inputs among `size` state entries and n nodes."""
        if (kernel, size) not in self._places:
            order = torch.arange(self._depths.shape[1], device=self._depths.device)
            levels = self._depths[..., None] - torch.arange(kernel - 1, -1, -1, device=order.device)  # [b, n, kernel]
            is_there = self._ancestors[:, 0, :, None] & (self._depths[:, None, None] == levels[..., None])
            nodes = (is_there * order).sum(-1)
            self._places[kernel, size] = size + torch.where(levels < 0, levels, nodes)
        return self._places[kernel, size]

    def delta_rule(self, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any) -> Any:
        """Compute the scan of Gated DeltaNet or Kimi Linear; return `[b, n, heads, v]` and the unchanged state."""
        queries, keys = (_unit(part, value.shape[-2]) for part in (query, key))
        decays = g.float() if g.dim() == keys.dim() else g.float()[..., None]
        output = self._scan(queries * query.shape[-1] ** -0.5, keys, value.float(), decays, beta.float()[..., None])
        return output.to(query.dtype, memory_format=torch.contiguous_format), self._recurrence

    def mamba_2(
        self,
        value: Tensor,
        dt: Tensor,
        rate: Tensor,
        key: Tensor,
        query: Tensor,
        *,
        dt_bias: Tensor,
        D: Tensor | None = None,  # noqa: N803  # Transformers' name
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        """Compute Mamba-2's scan `[b, n, heads, v]` of n nodes, each from its parent's state.

        With `return_final_states` also return the unchanged state before the tree, since no node is accepted yet.
        """
        # Time steps are not clamped: Transformers clamps them for several tokens, but plain decoding runs single ones.
        time_steps = softplus(dt + dt_bias.to(dt.dtype)).float()[..., None]
        queries, keys = (_for_heads(part.float(), value.shape[-2]) for part in (query, key))
        decays = rate.float()[..., None] * time_steps
        output = self._scan(queries, keys, value.float() * time_steps, decays, has_values_first=True)
        output = output if D is None else output + value.float() * D[:, None]
        return (output.contiguous(), self._recurrence) if return_final_states else output.contiguous()

    def _scan(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        decays: Tensor,
        rates: Tensor | None = None,
        *,
        has_values_first: bool = False,
    ) -> Tensor:
        """Multiply each node's query with the state after the node's path: `[b, n, heads, v]`.

        All inputs are `[b, n, heads, any]`. A node turns a state S, in float32, into e^decay S + key value, or with
        rates into e^decay S + key (rate (value - key e^decay S)). Sources: Gated Delta Networks (arXiv 2412.06464),
        equation 10; Transformers are SSMs (arXiv 2405.21060), section 6.
        """
        state = (self._recurrence.mT if has_values_first else self._recurrence).float()
        queries, keys, values, decays = (part.transpose(1, 2) for part in (queries, keys, values, decays))
        with _without_autocast(state.device.type):
            decays = self._ancestors.to(decays.dtype) @ decays
            between, fading = _between(decays, self._ancestors), decays.exp()
            if rates is not None:  # subtract the values that the state and earlier nodes have for the same keys
                rates = rates.transpose(1, 2)
                wanted, overlap = rates * (values - (keys * fading) @ state), rates * _products(keys, keys, between)
                values = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
            added = (values, keys) if has_values_first else (keys, values)
            self._updates[self._inside] = _Updates(*added, decays)
            outputs = (queries * fading) @ state + _products(queries, keys, between) @ values
        return outputs.transpose(1, 2)

    def noted(self, layer: int) -> list[Tensor]:
        """Return the inputs `[b, c, n]` of a layer's convolution, and if it has a scan, the tensors of its `_Updates`.

        Raises a `ValueError` if the layer did not call the replaced functions.
        """
        if layer not in self._inputs or (self._states[layer].recurrence is not None) != (layer in self._updates):
            raise ValueError(
                f"The recurrent layer {layer} read a tree without the functions of its modelling file{_REPLACED}"
            )
        return [self._inputs[layer], *self._updates.get(layer, ())]


def _unit(parts: Tensor, heads: int) -> Tensor:
    """Scale the vectors `parts` `[..., n, any heads, k]` to length 1, and repeat them for `heads` heads."""
    states = parts.float()
    return _for_heads(states * torch.rsqrt((states * states).sum(-1, keepdim=True) + 1e-6), heads)


def _for_heads(parts: Tensor, heads: int) -> Tensor:
    """Repeat each head's vectors in `parts` `[..., any heads, k]` until there are `heads` heads."""
    return parts if parts.shape[-2] == heads else parts.repeat_interleave(heads // parts.shape[-2], dim=-2)


def _between(decays: Tensor, ancestors: Tensor) -> Tensor:
    """Subtract each ancestor's decay from each node's: `[..., n, any]` -> `[..., n, n, any]`; -inf for other pairs."""
    return (decays.unsqueeze(-2) - decays.unsqueeze(-3)).masked_fill_(~ancestors.unsqueeze(-1), float("-inf"))


def _products(left: Tensor, right: Tensor, between: Tensor) -> Tensor:
    """Sum left_i * right_j * exp(between_ij) over k, for all nodes i and j: `[..., n, k]` -> `[..., n, n]`."""
    fading = between.exp()
    if fading.shape[-1] == 1:
        return (left @ right.mT) * fading.squeeze(-1)
    return (fading.mul_(right.unsqueeze(-3)) @ left.unsqueeze(-1)).squeeze(-1)  # in place, since it is large


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast, because plain decoding does not cast operations on states either."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


# Function in a modelling file of Transformers -> the method that replaces it for a tree.
_READERS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": WholeTree.convolved,
    "torch_chunk_gated_delta_rule": WholeTree.delta_rule,
    "chunk_kimi_delta_attention": WholeTree.delta_rule,
    "mamba2_chunk_scan": WholeTree.mamba_2,
}


class _TreeReader:
    """Replaces a scan or convolution `own`: a call with `resps_tree` runs `reads` for that tree, others run `own`."""

    def __init__(self, own: Callable[..., Any], reads: Callable[..., Any]) -> None:
        self._own, self._reads = own, reads

    def __call__(self, *arguments: Any, resps_tree: WholeTree | None = None, **keywords: Any) -> Any:
        if resps_tree is None:
            return self._own(*arguments, **keywords)
        return self._reads(resps_tree, *arguments, **keywords)


def reading_trees(mixers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Replace scans and convolutions in these mixers' modelling files by `_TreeReader`s inside a `with` block."""
    changes = [  # no hooks, since these reach only modules, and a scan is a function
        Change(sys.modules[module], name, partial(_TreeReader, reads=reads))
        for module in dict.fromkeys(type(mixer).__module__ for mixer in mixers)
        for name, reads in _READERS.items()
        if hasattr(sys.modules[module], name)
    ]
    return lent.holding(*changes)


class WholeTreeCache(Cache):
    """The cache of a forward over a tree: keys and values in `layers`, and the unchanging states of `tree`."""

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

    def get_recurrent_states_to_keep(self, layer_idx: int | None = None) -> int:
        return 0

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        pass


class StateKinds:
    """Groups recurrent layers with states of equal sizes, to advance the states of a group together.

    A group's states can be stacked: `[layers, b, c, kernel]` and, unless the layers are short convolutions, `[layers,
    b, heads, k, v]`. Raises a `ValueError` if a mixer left no state in `cache`.
    """

    def __init__(self, target: PreTrainedModel, cache: Cache) -> None:
        alike = defaultdict(list)
        for layer in sorted(known_mixers(target)):
            states = _states_in(cache, layer)
            if states.convolution is None:
                raise ValueError(f"The recurrent layer {layer} has kept no state of the prompt{_REPLACED}")
            sizes = [None if part is None else (part.shape[1:], part.dtype, part.device) for part in states]
            alike[tuple(sizes)].append(layer)
        self._kinds = [(layers, kind[1] is not None) for kind, layers in alike.items()]

    @property
    def sizes(self) -> list[str]:
        """For each tensor of stacked states, a character per dimension: b for rows, a dot for a fixed size."""
        return [part for _, is_scanned in self._kinds for part in (".b..", *[".b..."] * is_scanned)]

    def held_by(self, cache: Cache) -> dict[int, LayerStates]:
        """Map each recurrent layer's index to its states in a cache, without copying the states."""
        return {layer: _states_in(cache, layer) for layers, _ in self._kinds for layer in layers}

    def stacked(self, cache: Cache) -> list[Tensor]:
        """Copy a cache's states: for each group the stacked convolution states, then its recurrent states, if any."""
        found = list[Tensor]()
        for layers, is_scanned in self._kinds:
            states = [_states_in(cache, layer) for layer in layers]
            found.append(torch.stack([part.convolution for part in states]))
            if is_scanned:
                found.append(torch.stack([part.recurrence for part in states if part.recurrence is not None]))
        return found

    def give_back(self, tensors: Sequence[Tensor], cache: Cache, rows: slice) -> None:
        """Copy the states of `rows` from `tensors`, a result of `stacked`, to a cache."""
        for layer, states in self.by_layer(tensors).items():
            held: Any = cache.layers[layer]
            held.conv_states[0] = states.convolution[rows].clone()
            if states.recurrence is not None:
                held.recurrent_states[0] = states.recurrence[rows].clone()

    def by_layer(self, tensors: Sequence[Tensor]) -> dict[int, LayerStates]:
        """Map each layer's index to its states, which are views of `tensors`, a result of `stacked`."""
        found: dict[int, LayerStates] = {}  # dynamo knows no `dict[int, LayerStates]()`
        parts = iter(tensors)
        for layers, is_scanned in self._kinds:
            convolutions, recurrences = next(parts), next(parts) if is_scanned else None
            for place, layer in enumerate(layers):
                found[layer] = LayerStates(convolutions[place], None if recurrences is None else recurrences[place])
        return found

    def noted(self, tree: WholeTree) -> list[Tensor]:
        """For each group, stack the tensors that `tree.noted` returns for its layers: `[layers, b, ...]`."""
        found: list[Tensor] = []
        for layers, _ in self._kinds:
            found += [torch.stack(part) for part in zip(*[tree.noted(layer) for layer in layers], strict=True)]
        return found

    def advance(self, states: Mapping[int, LayerStates], noted: Sequence[Tensor], path: Tensor) -> None:
        """Advance `states` in place by the `noted` values along `path` `[b, m]`; short rows repeat their last node."""
        is_kept = torch.diff(path, prepend=path.new_full((len(path), 1), -1)) != 0
        notes = iter(noted)
        for layers, is_scanned in self._kinds:
            own, inputs = [states[layer] for layer in layers], next(notes)
            path, is_kept = path.to(inputs.device), is_kept.to(inputs.device)
            convolutions = [part.convolution for part in own]
            kept = inputs.gather(-1, path[None, :, None].expand(*inputs.shape[:-1], -1))
            before = torch.cat([torch.stack(convolutions), kept.to(convolutions[0].dtype)], dim=-1)
            kernel = convolutions[0].shape[-1]
            window = is_kept.sum(1, keepdim=True) + torch.arange(kernel, device=path.device)
            after = before.gather(-1, window[:, None].expand(*before.shape[:-1], -1))
            torch._foreach_copy_(convolutions, after.unbind())
            if is_scanned:
                updates = _Updates(*(next(notes) for _ in _Updates._fields))
                recurrences = (part.recurrence for part in own if part.recurrence is not None)
                with _without_autocast(inputs.device.type):
                    updates.advance(recurrences, path, is_kept)


def _states_in(cache: Cache, layer: int) -> LayerStates:
    held: Any = cache.layers[layer]
    return LayerStates(held.conv_states[0], held.recurrent_states[0])


class RecurrentMixers:
    """Lets a target's recurrent layers, if any, run over trees with a dynamic cache."""

    def __init__(self, target: PreTrainedModel, cache: Cache) -> None:
        self._target, self._cache = target, cache
        self._mixers = known_mixers(target)
        self._kinds: StateKinds | None = None
        self._noted: list[Tensor] = []  # values noted for the newest tree, until `keep` or `drop`

    def __bool__(self) -> bool:
        return bool(self._mixers)

    @contextmanager
    def reading(self, tree: DraftTree) -> Iterator[dict[str, Any]]:
        """Yield extra keywords for the forward over a tree inside the `with` block; replace scans for that forward.

        There are no keywords for a lone root, whose forward advances the states.
        """
        self.drop()
        if not self._mixers or tree.node_count == 1:
            yield {}
            return
        self._kinds = self._kinds or StateKinds(self._target, self._cache)
        whole = WholeTree(tree.depths, tree.ancestors, self._kinds.held_by(self._cache))
        with reading_trees(self._mixers.values()):
            yield {CACHE_KEYWORD: WholeTreeCache(self._cache.layers, whole), "resps_tree": whole}
        self._noted = self._kinds.noted(whole)

    def keep(self, path: Tensor) -> None:
        if self._noted and self._kinds is not None:
            self._kinds.advance(self._kinds.held_by(self._cache), self._noted, path)
        self.drop()

    def drop(self) -> None:
        self._noted = []
