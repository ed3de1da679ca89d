"""What a block head learns below many anchors of a text at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.block_head import CandidateSelector, MarkovHead
from .losses import Teacher


def draw_anchors(predicted: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw the roots of a batch's blocks: where a token is learned from, and the next one, too.

    Args:
        predicted: `[b, t]` bool, the tokens that are learned from.
        share: of these roots; 1 takes all, and draws nothing.

    Returns:
        `[b, m]` positions, and `[b, m]` bool which of them are roots: texts with fewer are filled up.
    """
    may = predicted[:, :-1] & predicted[:, 1:]
    counts = (may.sum(-1, keepdim=True) * share).ceil().long()
    order = torch.zeros_like(may, dtype=torch.float32) if share == 1 else torch.rand_like(may, dtype=torch.float32)
    anchors = order.masked_fill(~may, 2.0).argsort(dim=-1, stable=True)[:, : max(int(counts.max()), 1)]
    return anchors, torch.arange(anchors.shape[1], device=anchors.device) < counts


def contexts_of(
    correction: MarkovHead | CandidateSelector, hidden: Tensor, before: Tensor, first: Tensor | None
) -> Tensor:
    """What a correction multiplies its table by after the true tokens.

    Args:
        correction: of the head.
        hidden: `[k, n, h]` outputs that predict the tokens of n paths.
        before: `[k, n]` the true token before each.
        first: `[n, h]` output of the root's slot, where that predicts nothing.

    Returns:
        `[k, n, r]`.
    """
    rows = correction.before(before)
    if not isinstance(correction, MarkovHead) or correction.kind != "rnn":
        return correction.context(rows[:, :, None], hidden)[:, :, 0]
    state, found = correction.state_at(rows[0, :, None], first), []
    for states, own in zip(hidden, rows, strict=True):
        context, state = correction.step(own[:, None], states, state)
        found.append(context[:, 0])
    return torch.stack(found)


def selection_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    selector: CandidateSelector,
    contexts: Tensor,
    chunk_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross entropy of a selector's scores of a slot's likeliest candidates, whose own logits are not trained by it.

    Args:
        hidden: `[n, h]` normed outputs.
        weight: `[d, h]` output rows.
        teacher: the target's distribution at the n tokens.
        selector: of the head.
        contexts: `[n, r]`, see `contexts_of`.
        chunk_size: slots whose logits are alive at once.
        bias: `[d]` of the output rows.

    Returns:
        Loss of each slot, `[n]`; the less of the target's probability the candidates have, the less it is.
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
    """The share of a slot's probabilities that the target shares, 1 - L1 / 2: what a confidence head learns.

    Arguments as for `soft_cross_entropy`, of one level. Source: DSpark (arXiv 2607.05147).

    Returns:
        fp32 `[n]`.
    """
    shares = []
    for start in range(0, max(len(hidden), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = F.linear(hidden[rows].to(weight.dtype), weight, bias).float()
        if added is not None:
            logits += F.linear(added[0][rows].to(added[1].dtype), added[1]).float()
        shares.append(torch.minimum(logits.softmax(-1), teacher.probabilities(rows)).sum(-1))
    return torch.cat(shares)
