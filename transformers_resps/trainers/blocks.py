"""Draws the training positions (anchors) of a block head, and computes the losses of its corrections."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.block_head import CandidateSelector, MarkovHead
from .losses import Teacher


def draw_anchors(predicted: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw a share of the positions at which a block can start; a share of 1 takes all, without random numbers.

    A block can start where this token and the next are `predicted` (`[b, t]` bool). Returns m positions per text,
    `[b, m]`, and `[b, m]` bool, false for padding.
    """
    may = predicted[:, :-1] & predicted[:, 1:]
    counts = (may.sum(-1, keepdim=True) * share).ceil().long()
    order = torch.zeros_like(may, dtype=torch.float32) if share == 1 else torch.rand_like(may, dtype=torch.float32)
    anchors = order.masked_fill(~may, 2.0).argsort(dim=-1, stable=True)[:, : max(int(counts.max()), 1)]
    return anchors, torch.arange(anchors.shape[1], device=anchors.device) < counts


def contexts_of(
    correction: MarkovHead | CandidateSelector, hidden: Tensor, before: Tensor, first: Tensor | None
) -> Tensor:
    """Compute vectors `[k, n, r]` of rank r: times a correction's table, they are added to the logits of n blocks.

    `hidden` `[k, n, h]` has the outputs that predict the tokens of k levels, `before` `[k, n]` the true token before
    each, and `first` `[n, h]` the outputs at the blocks' roots, or `None` if those predict the first level.
    """
    rows = correction.before(before)
    if not isinstance(correction, MarkovHead) or correction.kind != "rnn":
        return correction.context(rows[:, :, None], hidden)[:, :, 0]
    state, contexts = correction.state_at(rows[0, :, None], first), []
    for states, token_rows in zip(hidden, rows, strict=True):
        context, state = correction.step(token_rows[:, None], states, state)
        contexts.append(context[:, 0])
    return torch.stack(contexts)


def selection_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    selector: CandidateSelector,
    contexts: Tensor,
    chunk_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the cross entropy `[n]` of a selector's scores, for the head's likeliest tokens, with the target.

    The target's probabilities are not renormalised over these tokens. The head's logits get no gradient.
    `contexts` `[n, r]` come from `contexts_of`; for the other arguments see `soft_cross_entropy`, with one level.
    """
    losses = []
    for start in range(0, max(len(hidden), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        with torch.no_grad():
            logits = F.linear(hidden[rows].to(weight.dtype), weight, bias).float()
            base, candidates = logits.topk(selector.candidates, dim=-1)
            wanted = teacher.probabilities(rows).gather(1, candidates)
        scores = base + (selector.rows(candidates) @ contexts[rows, :, None].to(selector.table.dtype))[..., 0].float()
        losses.append(-(wanted * scores.log_softmax(-1)).sum(-1))
    return torch.cat(losses)


@torch.no_grad()
def shared_probability(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    chunk_size: int,
    bias: Tensor | None = None,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the overlap of head's and target's probabilities, 1 - L1 / 2, fp32 `[n]`: a confidence head's labels.

    The arguments are those of `soft_cross_entropy`, for one level. Source: DSpark (arXiv 2607.05147).
    """
    shares = []
    for start in range(0, max(len(hidden), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = F.linear(hidden[rows].to(weight.dtype), weight, bias).float()
        if added is not None:
            logits += F.linear(added[0][rows].to(added[1].dtype), added[1]).float()
        shares.append(torch.minimum(logits.softmax(-1), teacher.probabilities(rows)).sum(-1))
    return torch.cat(shares)
