"""The soft cross-entropy loss of EAGLE-3's training-time test (arXiv 2503.01840 section 3.2), see `heads.unrolled`."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..verifying.prepacking import packed_linear


_CACHED_ROWS = 32  # Number of positions whose fp32 logits fit into a CPU's cache.


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's distribution over the draft vocabulary, kept as hidden states and output rows to save memory."""

    hidden: Tensor  # [n, h] the target's last hidden states at n positions, after its final norm
    weight: Tensor  # [d, h] the target's output rows of the draft vocabulary
    scale: float = 1.0  # factor of the target's logits
    softcap: float | None = None  # soft cap of the target's final logits
    bias: Tensor | None = None  # [d] bias of the target's output head

    def probabilities(self, rows: slice) -> Tensor:
        """Return fp32 probabilities `[c, d]` at the c positions that `rows` selects; each of c rows sums to 1."""
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
    """Compute the cross entropy of every level's logits with the target's probabilities.

    Gradients are computed together with the logits, chunk by chunk, as in fused linear losses. Under autocast to bf16
    the head's logits are computed in bf16, the teacher's in its own dtype, and sums over the draft vocabulary in fp32.

    `hidden` `[k, n, h]` are normed hidden states of k levels, which predict the same n tokens, `weight` `[d, h]` the
    head's output rows, and `row_weights` `[k, n]` the fp32 factors of the losses; 0 leaves a token out. The logits of
    `chunk_size` positions are in memory at once, as 2 fp32 buffers `[chunk_size, d]`. Two optional terms are added to
    the logits: `bias` `[d]`, which gets no gradient, and `states @ rows.T`, of rank r, where `added` is a pair of
    states `[k, n, r]` and rows `[d, r]`.

    Returns three tensors: the weighted sum of all losses; the unweighted sum of each level, `[k]`; and how often a
    level's best token is the target's, `[k]`. The last two have no gradient and skip tokens of weight 0.
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
        ctx: Any, teacher: Teacher, row_weights: Tensor, chunk_size: int, bias: Tensor | None, *pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss. `pairs` alternates states and output rows; the logits are the sum of their products."""
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
    """Return cross entropies `[c]`, and whether `best` is the top token, `[c]`; replace `logits` by the gradient."""
    losses, tops = [], []
    for part, wanted in zip(_cached_parts(logits), _cached_parts(probabilities), strict=True):
        exact = part.float()
        top = exact.argmax(-1, keepdim=True)
        predicted = exact.softmax(-1)
        normaliser = exact.gather(-1, top) - predicted.gather(-1, top).log()  # the top probability never underflows
        losses.append(normaliser.squeeze(-1) - torch.linalg.vecdot(wanted, exact))
        tops.append(top.squeeze(-1))
        part.copy_(predicted.sub_(wanted))
    return torch.cat(losses), torch.cat(tops) == best


def _cached_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Split `rows` `[c, d]` into views that fit into a CPU's cache; on other devices return them as one view."""
    return rows.split(_CACHED_ROWS if rows.device.type == "cpu" else max(len(rows), 1))


def pack(rows: Tensor, slots: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """List the positions (slots) of each text at which outputs are needed, filled up to the same number q per text.

    `shape` is the batch's `(b, t)`. For m predicted tokens, `rows` `[m]` are the indices of their texts, and `slots`
    `[k, m]` the positions that predict them at each of k levels; a position below 0 counts as 0. Returns the ascending
    positions `[b, q]`, and the index `[k, m]` of each of `slots` among the returned positions of its text.
    """
    slots = slots.clamp(min=0)
    needed = torch.zeros(shape, dtype=torch.uint8, device=slots.device)
    needed[rows, slots] = 1
    count = max(int(needed.sum(-1).max()), 1)
    chosen = needed.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    columns = torch.zeros(shape, dtype=torch.long, device=slots.device)
    columns.scatter_(1, chosen, torch.arange(count, device=slots.device).expand_as(chosen))
    return chosen, columns[rows, slots]
