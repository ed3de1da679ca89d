"""Compute the loss of all draft levels in chunks: no `[positions, draft vocab]` tensor outlives its chunk."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..target.prepacking import packed_linear


_CACHED_ROWS = 32  # positions whose fp32 logits stay in a CPU's cache from one pass over them to the next


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's distribution over the draft vocabulary, in factored form.

    Attributes:
        hidden: `[n, h]` the target's last hidden state after its final norm.
        weight: `[d, h]` the target's output rows of the draft vocabulary.
        scale: what the target multiplies its logits by.
        softcap: the target's final soft cap, or `None`.
        bias: `[d]` of the target's output head, or `None`.
    """

    hidden: Tensor
    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    def probabilities(self, rows: slice) -> Tensor:
        """fp32 `[c, d]` of the positions `rows`, renormalised over the draft vocabulary."""
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every level's logits against the target's probabilities.

    Args:
        hidden: `[k, n, h]` normed hidden states of the k levels that predict the same n tokens.
        weight: `[d, h]` the head's output rows.
        teacher: the target's distribution at those n tokens.
        row_weights: fp32 `[k, n]` factor of each loss; 0 leaves a row out.
        chunk_size: positions whose logits are alive at once: 2 fp32 buffers `[chunk_size, d]`.
        bias: `[d]` of the output rows, if they are borrowed and have one; not trained.

    Under autocast to bf16 the head's products are in bf16; the teacher's are always in its own dtype, and what is
    summed over the draft vocabulary in fp32.

    Returns:
        The weighted sum of the losses; per level its unweighted sum `[k]` and the count of rows whose best token is
        the target's `[k]`, both over the rows of non-zero weight and without gradient.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2; gradients are formed with the logits, as in fused linear losses.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16:
        weight, bias = weight.bfloat16(), bias if bias is None else bias.bfloat16()
    with torch.autocast(device, enabled=False):
        return _SoftCrossEntropy.apply(hidden, weight, teacher, row_weights, chunk_size, bias)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function is untyped


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Teacher,
        row_weights: Tensor,
        chunk_size: int,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses, hits = row_weights.new_zeros(len(hidden)), row_weights.new_zeros(len(hidden))
        total = row_weights.new_zeros(())
        logits_of = packed_linear(weight, bias)
        for start in range(0, hidden.shape[1], chunk_size):
            rows = slice(start, start + chunk_size)
            probabilities = teacher.probabilities(rows)  # [c, d]
            best = probabilities.argmax(-1)
            for level in range(len(hidden)):
                states, factors = hidden[level, rows].to(weight.dtype), row_weights[level, rows]
                logits = logits_of(states)  # [c, d]
                loss, is_hit = _compared(logits, probabilities, best)
                losses[level] += (loss * (factors != 0)).sum()
                hits[level] += (is_hit & (factors != 0)).sum()
                total += (loss * factors).sum()
                slopes, factors = logits, factors[:, None]
                if hidden_grad is not None:
                    hidden_grad[level, rows] = (slopes @ weight) * factors
                if weight_grad is not None:
                    weight_grad += slopes.T @ (states * factors).to(weight.dtype)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(losses, hits)
        return total, losses, hits

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else hidden_grad * slope.to(hidden_grad.dtype)
        weight_grad = None if weight_grad is None else weight_grad * slope.to(weight_grad.dtype)
        return hidden_grad, weight_grad, None, None, None, None


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
