"""EAGLE-3's training-time test: a head reads its own output for k levels, as when it drafts, and the loss of them all.

Source: EAGLE-3 (arXiv 2503.01840) section 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting import Entries, TrainableModel, Wanted
from ..verifying.prepacking import packed_linear


_CACHED_ROWS = 32  # positions whose fp32 logits stay in a CPU's cache from one pass over them to the next


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's distribution over the draft vocabulary, in factored form."""

    hidden: Tensor  # [n, h] the target's last hidden state after its final norm
    weight: Tensor  # [d, h] the target's output rows of the draft vocabulary
    scale: float = 1.0  # what the target multiplies its logits by
    softcap: float | None = None  # of the target's final logits
    bias: Tensor | None = None  # [d] of the target's output head

    def probabilities(self, rows: slice) -> Tensor:
        """fp32 `[c, d]` of the positions `rows`, renormalised over the draft vocabulary."""
        with torch.autocast(self.weight.device.type, enabled=False):
            logits = F.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias).float()
        for part in _cached_parts(logits):
            if self.scale != 1.0:
                part.mul_(self.scale)
            if self.softcap is not None:
                part.div_(self.softcap).tanh_().mul_(self.softcap)
            part.copy_(part.softmax(-1))
        return logits


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    row_weights: Tensor,
    chunk_size: int = 1024,
    bias: Tensor | None = None,
    added: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every level's logits against the target's probabilities.

    Args:
        hidden: `[k, n, h]` normed hidden states of the k levels that predict the same n tokens.
        weight: `[d, h]` the head's output rows.
        teacher: the target's distribution at those n tokens.
        row_weights: fp32 `[k, n]` factor of each loss; 0 leaves a row out.
        chunk_size: positions whose logits are alive at once: 2 fp32 buffers `[chunk_size, d]`.
        bias: `[d]` of the output rows, if they are borrowed and have one; not trained.
        added: states `[k, n, r]` and rows `[d, r]` whose product is added to the logits.

    Under autocast to bf16 the head's products are in bf16; the teacher's are always in its own dtype, and what is
    summed over the draft vocabulary in fp32.

    Returns:
        The weighted sum of the losses; per level its unweighted sum `[k]` and the count of rows whose best token is
        the target's `[k]`, both over the rows of non-zero weight and without gradient.

    Gradients are formed with the logits, as in fused linear losses.
    """
    device = hidden.device.type
    pairs = [hidden, weight, *(added or ())]
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16:
        pairs[1::2] = [rows.bfloat16() for rows in pairs[1::2]]
        bias = bias if bias is None else bias.bfloat16()
    with torch.autocast(device, enabled=False):
        return _SoftCrossEntropy.apply(teacher, row_weights, chunk_size, bias, *pairs)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function is untyped


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Teacher,
        row_weights: Tensor,
        chunk_size: int,
        bias: Tensor | None,
        *pairs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`pairs` are states and rows in turn: the logits are the sum of their products."""
        trained, weights = ctx.needs_input_grad[4:], pairs[1::2]
        grads = [
            torch.zeros_like(part, dtype=torch.float32 if place % 2 else part.dtype) if trained[place] else None
            for place, part in enumerate(pairs)
        ]
        losses, hits = row_weights.new_zeros(len(row_weights)), row_weights.new_zeros(len(row_weights))
        total = row_weights.new_zeros(())
        products = [packed_linear(weight, None if place else bias) for place, weight in enumerate(weights)]
        for start in range(0, row_weights.shape[1], chunk_size):
            rows = slice(start, start + chunk_size)
            probabilities = teacher.probabilities(rows)  # [c, d]
            best = probabilities.argmax(-1)
            for level, factors in enumerate(row_weights[:, rows]):
                states = [part[level, rows].to(weight.dtype) for part, weight in zip(pairs[::2], weights, strict=True)]
                logits = products[0](states[0])  # [c, d]
                for product, part in zip(products[1:], states[1:], strict=True):
                    logits += product(part)
                loss, is_hit = _compared(logits, probabilities, best)
                losses[level] += (loss * (factors != 0)).sum()
                hits[level] += (is_hit & (factors != 0)).sum()
                total += (loss * factors).sum()
                slopes, factors = logits, factors[:, None]
                for part, weight, into, into_rows in zip(states, weights, grads[::2], grads[1::2], strict=True):
                    if into is not None:
                        into[level, rows] = (slopes @ weight) * factors
                    if into_rows is not None:
                        into_rows += slopes.T @ (part * factors).to(weight.dtype)
        ctx.save_for_backward(
            *(None if grad is None else grad.to(part.dtype) for grad, part in zip(grads, pairs, strict=True))
        )
        ctx.mark_non_differentiable(losses, hits)
        return total, losses, hits

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * slope.to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, None, *grads


def _compared(logits: Tensor, probabilities: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy `[c]` in fp32, and whether `best` is the most likely; leaves the slopes in `logits` `[c, d]`."""
    losses, tops = [], []
    for part, wanted in zip(_cached_parts(logits), _cached_parts(probabilities), strict=True):
        exact = part.float()
        top = exact.argmax(-1, keepdim=True)
        predicted = exact.softmax(-1)
        normaliser = exact.gather(-1, top) - predicted.gather(-1, top).log()  # the highest one never underflows
        losses.append(normaliser.squeeze(-1) - torch.linalg.vecdot(wanted, exact))
        tops.append(top.squeeze(-1))
        part.copy_(predicted.sub_(wanted))
    return torch.cat(losses), torch.cat(tops) == best


def _cached_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of `[c, d]`, small enough for a CPU's cache."""
    parts: tuple[Tensor, ...] = rows.split(_CACHED_ROWS if rows.device.type == "cpu" else max(len(rows), 1))
    return parts


class UnrolledEntries(Entries):
    """Attention of level k: causal over the entries of level 0, plus the own slot's entry of levels 1 to k.

    That is what a node at depth k sees when drafting: true features of the prefix, then its own chain. Layers of ours
    take one softmax over `[t + k]` scores, without the dense `(k t)^2` mask; those of Transformers get that of
    `[q, k q + t]`, with the own entries first. Queries have the positions `slots` `[b, q]` alone.
    """

    def __init__(self, slots: Tensor, length: int) -> None:
        self._sees = torch.arange(length, device=slots.device) <= slots[:, None, :, None]  # [b, 1, q, t]
        self._keys: dict[int, list[Tensor]] = {}  # of each layer and level
        self._values: dict[int, list[Tensor]] = {}

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]  # the level tells
        """The mask of the pass that begins; `None` for level 0."""
        count = self._sees.shape[2]
        if not self._own_entries:
            return None
        own = torch.eye(count, dtype=torch.bool, device=self._sees.device).repeat(1, self._own_entries // count)
        return torch.cat([own.expand(len(self._sees), 1, -1, -1), self._sees], dim=-1)

    @property
    def first_slot(self) -> int:  # type: ignore[override]  # likewise
        return -self._own_entries

    @property
    def _own_entries(self) -> int:
        """How many entries all slots have of their own when a pass begins."""
        return self._sees.shape[2] * len(next(iter(self._keys.values()), ()))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        joined = []
        for kept, new in ((self._keys, keys), (self._values, values)):
            kept.setdefault(layer_idx, []).append(new)
            of_text, *own = kept[layer_idx]
            joined.append(torch.cat([*own, of_text], dim=2) if own else of_text)
        return joined[0], joined[1]

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attend = self._next_level if layer in self._keys else self._first_level
        self._keys.setdefault(layer, []).append(keys)
        self._values.setdefault(layer, []).append(values)
        return attend(queries, self._keys[layer], self._values[layer])

    def _first_level(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention of level 0, over the keys and values of all positions."""
        is_whole = queries.shape[2] == keys[0].shape[2]
        return F.scaled_dot_product_attention(
            queries,
            keys[0],
            values[0],
            attn_mask=None if is_whole else self._sees,
            is_causal=is_whole,
            enable_gqa=queries.shape[1] != keys[0].shape[1],
        )

    def _next_level(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention of the slots at a later level: each sees the text before it, and its own entries."""
        (true_keys, *own_keys), (true_values, *own_values) = keys, values
        batch, heads, length, width = queries.shape
        groups = true_keys.shape[1]
        grouped = queries.reshape(batch, groups, heads // groups, length, width) * width**-0.5
        scores = grouped.flatten(2, 3) @ true_keys.mT  # [b, kv heads, group * length, t]
        scores = scores.unflatten(2, (heads // groups, length)).masked_fill(~self._sees[:, None], float("-inf"))
        diagonals = [(grouped * own[:, :, None]).sum(-1, keepdim=True) for own in own_keys]
        weights = (
            torch.cat([scores, *diagonals], dim=-1)
            .softmax(-1, dtype=torch.promote_types(true_values.dtype, torch.float32))
            .to(true_values.dtype)
        )
        total = true_keys.shape[2]
        attended: Tensor = (weights[..., :total].flatten(2, 3) @ true_values).unflatten(2, (heads // groups, length))
        for index, own in enumerate(own_values):
            attended = attended + weights[..., total + index, None] * own[:, :, None]
        return attended.reshape(batch, heads, length, width)


def unroll(
    model: TrainableModel,
    features: Tensor,
    tokens: Tensor,
    levels: int,
    slots: Tensor | None = None,
    *,
    first_pass: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run the first `levels` levels over whole texts at once.

    At level k the slot t reads the true token t + 1 + k and predicts token t + 2 + k, at position t + k; later levels
    read the level before in place of the feature. Slots whose token lies beyond the text hold nothing of use.

    Args:
        model: a head, bound to its target; of several depths, each is a level over the entries of its own.
        features: `[b, t, F]` of the target.
        tokens: `[b, t]` of the texts.
        levels: at least 1; at most as many as depths, where there are several.
        slots: `[b, q]` the slots that any level's prediction is wanted for, ascending; `None` for all. The others
            only give their keys and values of level 0.
        first_pass: computes level 0 in place of `model.run`.

    Returns:
        `[levels, b, q, h]`, after the final norm.
    """
    batch, length = tokens.shape
    everywhere = torch.arange(length, device=features.device).expand(batch, length)
    slots = everywhere if slots is None else slots
    later = slots if model.depths == 1 else everywhere  # of the levels after the first
    texts = torch.arange(batch, device=features.device)[:, None]
    tokens, fused = F.pad(tokens, (0, levels)), model.fuse(features.to(model.dtype))
    at, hidden, entries, outputs = everywhere, fused, UnrolledEntries(later, length), list[Tensor]()
    run, wanted = first_pass or model.run, cast(Wanted, later)
    for level in range(levels):
        depth = min(level, model.depths - 1)
        entries = UnrolledEntries(later, length) if depth else entries
        output = run(depth, tokens[texts, at + level + 1], hidden, model.places(at + level), entries, wanted)
        outputs.append(model.normed(output, depth))
        hidden = fused[texts, later] if model.rereads_target else model.feedback(output)
        at, run, wanted = later, model.run, slice(None)
    states = torch.stack(outputs)
    return states if model.depths == 1 else states[:, texts, slots]


def pack(rows: Tensor, slots: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Choose the slots that a batch's losses need: the same number q in every text.

    Args:
        rows: `[m]` the text of each predicted token.
        slots: `[k, m]` the slot that predicts it, by level; what lies before the text counts as slot 0.
        shape: b and t.

    Returns:
        `[b, q]` slots of each text, ascending, and `[k, m]` where `slots` are among them.
    """
    slots = slots.clamp(min=0)
    needed = torch.zeros(shape, dtype=torch.uint8, device=slots.device)
    needed[rows, slots] = 1
    count = max(int(needed.sum(-1).max()), 1)
    chosen = needed.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    columns = torch.zeros(shape, dtype=torch.long, device=slots.device)
    columns.scatter_(1, chosen, torch.arange(count, device=slots.device).expand_as(chosen))
    return chosen, columns[rows, slots]
