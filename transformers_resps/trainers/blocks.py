"""Draw anchors of training blocks, and compute the losses of a block head's corrections."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.block_head import CandidateSelector, MarkovHead
from .losses import Teacher


def draw_anchors(predicted: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw a share of the possible roots of blocks; a share of 1 takes all, without random numbers.

    A root is `predicted` (`[b, t]` bool) together with the next token. Returns positions `[b, m]`, and `[b, m]` bool
    whether each is a root or padding.
    """
    may = predicted[:, :-1] & predicted[:, 1:]
    counts = (may.sum(-1, keepdim=True) * share).ceil().long()
    order = torch.zeros_like(may, dtype=torch.float32) if share == 1 else torch.rand_like(may, dtype=torch.float32)
    anchors = order.masked_fill(~may, 2.0).argsort(dim=-1, stable=True)[:, : max(int(counts.max()), 1)]
    return anchors, torch.arange(anchors.shape[1], device=anchors.device) < counts


def contexts_of(
    correction: MarkovHead | CandidateSelector, hidden: Tensor, before: Tensor, first: Tensor | None
) -> Tensor:
    """Compute the factors `[k, n, r]` of a correction's table after the true tokens.

    `hidden` `[k, n, h]` are outputs that predict the tokens of n paths, `before` `[k, n]` the true token before each,
    and `first` `[n, h]` the output of the root's slot, if that predicts nothing.
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
    """Compute the cross entropy `[n]` of a selector's scores of each slot's candidates; their logits get no gradient.

    It is weighted by the target's probability of all candidates. `contexts` `[n, r]` come from `contexts_of`; see
    `soft_cross_entropy` for the others, of one level.
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
    """Compute the overlap of head and target, 1 - L1 / 2, fp32 `[n]`: the label of a confidence head.

    See `soft_cross_entropy` for the arguments, of one level. Source: DSpark (arXiv 2607.05147).
    """
    shares = []
    for start in range(0, max(len(hidden), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = F.linear(hidden[rows].to(weight.dtype), weight, bias).float()
        if added is not None:
            logits += F.linear(added[0][rows].to(added[1].dtype), added[1]).float()
        shares.append(torch.minimum(logits.softmax(-1), teacher.probabilities(rows)).sum(-1))
    return torch.cat(shares)
