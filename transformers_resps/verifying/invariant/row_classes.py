"""Find how many rows a layer's input must have, so that a row's result never depends on the other rows.

A kernel chooses its loops by the whole problem: it may sum a single row in another order than two rows, the last three
rows of seven in another order than the first four, or rows at the end of a thread's share in another order than the
rows inside. No documentation says when, so this module tries the kernels of the machine.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..masks import AttentionPattern
from ..prepacking import is_prepacked
from .attention import BLOCK, BlockLayout, BlockReads, invariant_attention, levels_below
from .experts import routed_layers


_CANDIDATES = (16, 8, 4, 2, 1)  # row counts; each divides the larger ones, so the largest one needed fits all layers
_COUNTS = (*range(1, 10), 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 49, 64, 65, 100, 128, 200, 512)
_FEWEST = 48  # the least number of rows to try, where products are expensive
_MOST_WORK = 2**29  # the most multiplications of a product over more rows
_TRIED = 12  # rows tried of each count: each shows another order of its sum with probability 0.5 or more (measured)
# Distances by which rows move in forwards with a fixed number of rows: kernels group rows by powers of two.
_SHIFTS = (1, 2, 4, 8, 15)
_APART = 13  # first row of the first range to try: no multiple of a kernel's sizes
_TRIED_VALUES = 2**14  # values tried of an activation or attention: one in 1,000 shows another computation (measured)
_SCALE = 3  # standard deviation of samples: in bfloat16 the two computations of gelu differ at -5 only
_PLACES = 256  # tokens of the text with which attention is tried
_CHAINS = (*range(1, 37), 128, _PLACES)  # lengths of chains: a kernel groups the rows of their heads by 32
# Nodes of each forward on a GPU, where a kernel is chosen by the whole shape of a product: twice the nodes of "auto",
# and few enough that weights, not products, take the time in float32, too.
_EXACTLY = 32
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def least_rows(
    answer: Callable[[range], Tensor],
    counts: Sequence[int] = _COUNTS,
    starts: Callable[[int], Sequence[int]] = lambda count: (0,),
) -> int | None:
    """Return the least r of 1, 2, 4, 8, 16 such that a row has the same bits in any multiple of r rows; else `None`.

    `answer(range)` computes these rows of one sample in one call, `[len(range), ...]`: rows of a matrix, or nodes of a
    chain, where a node depends on earlier nodes. `counts` are the numbers of rows to try; the largest, a multiple of
    16, is the sample's size. `starts(count)` are the first rows of the ranges of `count` rows; a chain begins at 0.
    """
    least = None
    known = answer(range(max(counts)))
    for candidate in _CANDIDATES:
        for count in counts:
            for start in starts(count) if gcd(count, _CANDIDATES[0]) == candidate else ():
                if not torch.equal(answer(range(start, start + count)), known[start : start + count]):
                    return least
        least = candidate
    return least


def keeps_rows(answer: Callable[[range], Tensor], starts: Sequence[int], count: int) -> bool:
    """Whether a row gets the same bits among any `count` rows, whatever its index and whatever the other rows are.

    For `answer` see `least_rows`. `starts` are the first rows of the ranges to try; each range is also tried shifted.
    """
    for start in starts:
        known = torch.cat([answer(range(first, first + count)) for first in (start, start + count)])
        for shift in _SHIFTS:
            moved = answer(range(start + shift, start + shift + count))
            if not torch.equal(moved, known[shift : shift + count]):
                return False
    return True


def kernel_settings() -> dict[str, Hashable]:
    """Map names to values of all settings that may select other kernels on a CPU, except autocast (see `admit`)."""
    onednn: Any = torch.backends.mkldnn
    # `torch.get_float32_matmul_precision()` raises where backends have different precisions.
    precision = onednn.matmul.fp32_precision
    return {
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.backends.mkldnn.enabled": onednn.enabled,
        "torch.backends.mkldnn.matmul.fp32_precision": "ieee" if precision == "none" else precision,
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
    }


@dataclass(frozen=True)
class RowNeeds:
    """The number of rows that a target's matrix products must have, so that kernels round every row alike."""

    forward: int  # must divide the number of nodes of a forward, in all rows together
    is_exact: bool = False  # whether a forward must have exactly this number of nodes, all of one row


def possible_needs(device: torch.device) -> list[RowNeeds]:
    """Return the `RowNeeds` that kernels on `device` may have, from the cheapest to the strictest."""
    if device.type != "cpu":
        return [RowNeeds(_EXACTLY, is_exact=True)]
    # AMX computes 16 rows in one way, and 17 in another.
    return [RowNeeds(_CANDIDATES[0]), RowNeeds(_CANDIDATES[0], is_exact=True)]


class RowClasses:
    """Finds how many rows a target's kernels need on this machine, and remembers this for each kind of layer."""

    def __init__(self) -> None:
        # (`kernel_settings`, needs, layer's type, sizes, dtype, bias and packing) -> rows
        self._known: dict[Hashable, int | None] = {}

    def needs(self, target: PreTrainedModel) -> RowNeeds:
        """Find the number of rows that a forward must have: a multiple of 1 to 16, or exactly 16; on a GPU exactly 32.

        In float64, whose rounding changes no token, 1 is enough. The first call costs about as much as a prompt of 60
        tokens. It runs no hooks and leaves the process's random state unchanged. Raises a `ValueError` if no such
        number serves a layer or attention.
        """
        if target.dtype is torch.float64:
            return RowNeeds(1)
        return self._needs(target, _parts)

    def needs_of_experts(self, target: PreTrainedModel) -> RowNeeds:
        """Return the `needs` of the experts alone, for code in which our kernels compute all other layers."""
        return self._needs(target, _routed_parts)

    def _needs(self, target: PreTrainedModel, parts: Callable[[PreTrainedModel, int], Iterator["_Part"]]) -> RowNeeds:
        for way in possible_needs(target.device):
            settings, needed = (*kernel_settings().values(), way), [1]
            for part in parts(target, way.forward):
                found = self._rows_of(part, settings, way)
                if found is None:
                    break
                needed.append(found)
            else:
                return RowNeeds(max(needed), way.is_exact)
        raise ValueError(
            f"{part} rounds a row by its place among {way.forward} rows, or by the others. {part.remedy}, or pass "
            "`invariant=False`."
        )

    @torch.no_grad()
    def _rows_of(self, part: "_Part", settings: tuple[Hashable, ...], way: RowNeeds) -> int | None:
        """Find the least rows that a part needs, or test the exact number in `way`; `None` if no number serves."""
        kind = *settings, part.kind
        if kind in self._known:
            return self._known[kind]
        found: int | None = way.forward
        if not way.is_exact:
            found = part.least_rows()
        elif not part.keeps_rows(way.forward):
            found = None
        if part.shows_order:
            self._known[kind] = found
        return found


@dataclass(frozen=True)
class _Layer:
    """A layer from `[..., inputs]` to `[..., outputs]`; its rows affect each other only by a kernel's rounding."""

    name: str
    module: Any
    inputs: int
    outputs: int
    dtype: torch.dtype
    device: torch.device
    weight: Tensor | None  # `[outputs, inputs]`
    remedy = "Load the model in float32, where drafts change no token without the mode either"

    def __str__(self) -> str:
        return f"`{self.name}` ({type(self.module).__name__}, {self.inputs} -> {self.outputs}, {self.dtype})"

    @property
    def kind(self) -> Hashable:
        module, weight = self.module, self.weight
        layout = None if weight is None else (weight.stride(), module.bias is None, is_prepacked(module))
        inner = tuple((type(part), *(weight.shape for weight in part.parameters())) for part in module.children())
        return type(module), self.inputs, self.outputs, self.dtype, self.device, layout, inner

    @property
    def shows_order(self) -> bool:
        """Whether results depend on the order in which the layer sums; false for a new adapter with weights of 0."""
        return self.weight is None or bool(self.weight.any())

    def least_rows(self) -> int | None:
        most = _COUNTS[-1] if self.weight is None else max(_MOST_WORK // self.weight.numel(), _FEWEST)
        size = max(count for count in _COUNTS if count <= most and count % _CANDIDATES[0] == 0)
        tried = _TRIED
        if self.weight is None:
            is_activation = next(self.module.parameters(), None) is None
            tried = max(_TRIED_VALUES // self.outputs if is_activation else 0, 4 * _TRIED)
        return least_rows(self._answers(size), [count for count in _COUNTS if count <= size], _spread(size, tried))

    def keeps_rows(self, count: int) -> bool:
        return keeps_rows(self._answers(2 * count), (0,), count)

    def _answers(self, size: int) -> Callable[[range], Tensor]:
        """Make a function that runs the layer on rows of a sample of this size."""
        sample = self._sample(size)

        def answer(rows: range) -> Tensor:
            found: Tensor = self.module.forward(sample[None, rows.start : rows.stop].clone())
            return found[0]

        return answer

    def _sample(self, size: int) -> Tensor:
        """Draw rows `[size, inputs]` such that one result of a linear layer is near 0 for each row."""
        # Larger results, rounded to bfloat16, hardly show another order of their sum (one in 10,000, measured).
        sample = (_SCALE * _random(size, self.inputs)).to(self.device, self.dtype)
        if self.weight is None:
            return sample
        rows = torch.arange(size, device=self.device)
        chosen = 7 * rows % self.outputs
        weight = self.weight[chosen].double()
        bias = 0 if self.module.bias is None else self.module.bias[chosen].double()
        places = weight.abs().topk(min(2, self.inputs)).indices
        sample.scatter_(1, places, 0)
        for place in places.t():
            rest = (sample.double() * weight).sum(dim=1) + bias
            sample[rows, place] = (-rest / weight[rows, place]).nan_to_num(0, 0, 0).to(self.dtype)
        return sample


@dataclass(frozen=True)
class _Attention:
    """A trial of `invariant_attention`, over chains of tokens that begin anywhere in a text."""

    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype
    device: torch.device
    remedy = "Use the attention of PyTorch as it was released"
    shows_order = True

    def __str__(self) -> str:
        return f"PyTorch's attention ({self.heads} heads over {self.kv_heads}, of {self.size}, {self.dtype})"

    @property
    def kind(self) -> Hashable:
        return self

    def least_rows(self) -> int | None:
        tried = max(_TRIED_VALUES // (self.heads * self.size), 1)
        return least_rows(self._answers(), _CHAINS, _spread(_PLACES, tried))

    def keeps_rows(self, count: int) -> bool:
        return keeps_rows(self._answers(is_exact=True), (BLOCK - count, _PLACES - 2 * count), count)

    def _answers(self, is_exact: bool = False) -> Callable[[range], Tensor]:
        """Make a function that computes attention of tokens as a prompt and as a tree; NaN if the results differ."""
        states = _random(self.heads + 2 * self.kv_heads, _PLACES, self.size)[None].to(self.device, self.dtype)
        query, key, value = states.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

        def answer(rows: range) -> Tensor:
            roots, depths = torch.tensor([[rows.start]]), torch.arange(len(rows))[None]
            ancestors = torch.ones(1, len(rows), len(rows), dtype=torch.bool).tril()
            tree, layouts = (roots, depths, ancestors), [BlockLayout.of_chain(roots, depths)]
            if is_exact:
                sizes = len(rows), _PLACES // BLOCK, levels_below(rows.start, len(rows) - 1)
                layouts.append(BlockLayout.of_sizes(*tree, *sizes))
            else:
                layouts.append(BlockLayout.of_tree(*tree))
            answers = []
            for layout in layouts:
                layout = BlockLayout(*(part.to(self.device) for part in layout))
                reads = BlockReads(layout, (roots + depths).to(self.device), self.dtype)
                inputs = query[:, :, rows.start : rows.stop], key, value, reads.mask(AttentionPattern())
                answers.append(invariant_attention(nn.Module(), *inputs, resps_reads=reads)[0][0])
            return answers[0] if torch.equal(*answers) else torch.full_like(answers[0], torch.nan)

        return answer


_Part = _Layer | _Attention


def _spread(size: int, tried: int) -> Callable[[int], list[int]]:
    """Make the `starts` of `least_rows`, spread over `size` rows, so that at least `tried` rows are tried."""

    def starts(count: int) -> list[int]:
        places = size - count + 1
        tries = min(-(-tried // count), places)
        return [(_APART + at * places // tries) % places for at in range(tries)]

    return starts


def _random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _routed_parts(target: PreTrainedModel, enough: int) -> Iterator[_Part]:
    for name, layer in routed_layers(target, enough):
        yield _Layer(name, layer, *_sizes(layer), target.dtype, target.device, layer.weight)


def _parts(target: PreTrainedModel, enough: int) -> Iterator[_Part]:
    """Yield linear layers, activations with the input size of the layer beside them, norms, experts and attention."""
    for prefix, parent in target.named_modules():
        children = dict(parent.named_children())
        widths = [inputs for part in children.values() if (inputs := _sizes(part)[0])]
        for child, part in children.items():
            name = f"{prefix}.{child}" if prefix else child
            if isinstance(part, nn.Linear | Conv1D):
                weight = part.weight if isinstance(part, nn.Linear) else part.weight.t()
                yield _Layer(name, part, *_sizes(part), weight.dtype, weight.device, weight)
            elif widths and type(part).__module__ in _ACTIVATIONS:
                yield _Layer(name, part, widths[-1], widths[-1], target.dtype, target.device, None)
            elif type(part).__name__.endswith("Norm") and getattr(part, "weight", None) is not None:
                yield _Layer(name, part, len(part.weight), len(part.weight), target.dtype, target.device, None)
    yield from _routed_parts(target, enough)
    config = target.config.get_text_config(decoder=True)
    config = (getattr(config, "per_layer_config", None) or [config])[0]  # Gemma 4's layers differ in size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    yield _Attention(heads, kv_heads, size, target.dtype, target.device)


def _sizes(layer: Any) -> tuple[int, int]:
    """Return the input and output size of a linear layer, with or without an adapter; 0 for other modules."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)
