"""How many rows a layer needs, so that a row gets the same bits whatever other rows stand beside it.

A kernel chooses its loops by the whole problem: it may sum a lone row in another order than two rows, the rest of a
number that four does not divide in another than the rows before it, and compute what lies where one thread ends in
another way than what lies in the middle. No documentation says when, so the kernels of this machine are tried.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .prepacking import is_prepacked


_CANDIDATES = (16, 8, 4, 2, 1)  # each divides those before it, so the largest of several layers serves them all
_COUNTS = (*range(1, 13), 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 96, 100, 128, 200, 512)
_FEWEST = 48  # rows tried at least, where products are expensive
_MOST_WORK = 2**29  # multiplications of a product over more rows
_TRIED = 12  # rows of each count: one shows another order of its sum with a probability of at least 0.5 (measured)
_SCALE = 3  # of the values: the two ways to compute gelu differ at -5
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def least_rows(
    answer: Callable[[range], Tensor],
    counts: Sequence[int] = _COUNTS,
    starts: Callable[[int], Sequence[int]] = lambda count: (0,),
) -> int | None:
    """Find how many rows must be computed together, or a multiple of them, so that their bits depend on no others.

    Args:
        answer: to these rows of one sample, computed together: `[len(rows), ...]`. They may be rows of a matrix, or
            the nodes of a chain, which depend on the nodes before them.
        counts: numbers of rows to try. The sample has as many as the largest, which is a multiple of 16.
        starts: where so many rows begin in the sample; a chain begins at 0.

    Returns:
        1, 2, 4, 8 or 16; `None` where not even multiples of 16 agree.
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


class RowClasses:
    """Finds the rows that a target's layers need on this machine, and keeps what it found of each kind of layer.

    A kind is a layer's type, sizes, dtype, bias and packing, and the number of threads.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int | None] = {}

    def least(self, target: PreTrainedModel) -> int:
        """Find how many rows a forward of the target must have, or a multiple of them.

        The first call costs about as much as a prompt of 60 tokens, another one a look at each layer. No hook runs,
        and the random state of the process stays.

        Args:
            target: on a CPU.

        Returns:
            1, 2, 4, 8 or 16.

        Raises:
            ValueError: a layer has no such number.
        """
        settings = torch.get_num_threads(), torch.backends.mkldnn.enabled
        least = 1
        for layer in _row_layers(target):
            kind = settings, layer.kind
            found = self._known[kind] if kind in self._known else layer.least_rows()
            if found is None:
                raise ValueError(
                    f"{layer} rounds a row by the number of rows beside it, even among multiples of 16, with "
                    f"{settings[0]} threads. Call `prepack(model)`, use another dtype or number of threads, or leave "
                    "out `invariant=True`."
                )
            if kind not in self._known and layer.shows_order:
                self._known[kind] = found
            least = max(least, found)
        return least


@dataclass(frozen=True, slots=True)
class _RowLayer:
    """A layer that answers each row `[inputs]` alone, by `[outputs]`."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    dtype: torch.dtype
    weight: Tensor | None  # `[outputs, inputs]`

    def __str__(self) -> str:
        return f"`{self.name}` ({type(self.module).__name__}, {self.inputs} -> {self.outputs}, {self.dtype})"

    @property
    def kind(self) -> Hashable:
        """Equal for layers that run the same kernels."""
        module, weight = self.module, self.weight
        layout = None if weight is None else (weight.stride(), module.bias is None, is_prepacked(module))
        return type(module), self.inputs, self.outputs, self.dtype, layout

    @property
    def shows_order(self) -> bool:
        """Not while a weight is zero, as a new adapter's is."""
        return all(bool(part.any()) for part in self.module.parameters() if part.dim() > 1)

    @torch.no_grad()
    def least_rows(self) -> int | None:
        """As the function, over random rows, each at several places."""
        work = max((part.numel() for part in self.module.parameters()), default=1)
        counts = [count for count in _COUNTS if count <= max(_MOST_WORK // work, _FEWEST)]
        size = max(count for count in counts if count % _CANDIDATES[0] == 0)
        sample = self._sample(size)

        def answer(rows: range) -> Tensor:
            found: Tensor = self.module.forward(sample[None, rows.start : rows.stop].clone())
            return found[0]

        def starts(count: int) -> list[int]:
            places, tries = size - count + 1, -(-_TRIED // count)
            return [(7 * count + at * places // tries) % places for at in range(tries)]

        return least_rows(answer, [count for count in counts if count <= size], starts)

    def _sample(self, size: int) -> Tensor:
        """Random rows `[size, inputs]`. Of a linear layer one result of each is almost 0: in the others, rounded to
        bfloat16, another order of the sum would hardly show (one of 10,000 differs, measured).
        """
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(size, self.inputs, generator=generator, dtype=torch.float32, device="cpu")
        sample = (_SCALE * sample).to(self.dtype)
        if self.weight is None:
            return sample
        rows = torch.arange(size)
        weight = self.weight[rows * 7 % self.outputs].double()
        places = weight.abs().topk(min(2, self.inputs)).indices
        sample.scatter_(1, places, 0)
        for place in places.t():
            rest = (sample.double() * weight).sum(dim=1)
            sample[rows, place] = (-rest / weight[rows, place]).nan_to_num(0, 0, 0).to(self.dtype)
        return sample


def _row_layers(target: PreTrainedModel) -> Iterator[_RowLayer]:
    """The linear layers, and the activations beside them, whose input is that of the last one."""
    for prefix, parent in target.named_modules():
        children = dict(parent.named_children())
        widths = [inputs for part in children.values() if (inputs := _sizes(part)[0])]
        for child, part in children.items():
            name = f"{prefix}.{child}" if prefix else child
            if isinstance(part, nn.Linear | Conv1D):
                weight = part.weight if isinstance(part, nn.Linear) else part.weight.t()
                yield _RowLayer(name, part, *_sizes(part), weight.dtype, weight)
            elif widths and type(part).__module__ in _ACTIVATIONS:
                yield _RowLayer(name, part, widths[-1], widths[-1], target.dtype, None)


def _sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, or of one that an adapter wraps; 0 of others."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)
