"""Block heads over whole texts: blocks below many anchors at once, as in training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.block_head import BoundBlockHead, CandidateSelector, MarkovHead
from ..verifying.attention import attend
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


def unroll_blocks(model: BoundBlockHead, features: Tensor, tokens: Tensor, anchors: Tensor, levels: int) -> Tensor:
    """Fill a block below each anchor, in one pass; see `run_blocks`.

    Returns:
        `[levels, b, m, h]`, normed.
    """
    slots = run_blocks(model, features, tokens, anchors, levels)
    return model.normed(model.predicting(slots, levels)).movedim(2, 0)


def run_blocks(model: BoundBlockHead, features: Tensor, tokens: Tensor, anchors: Tensor, levels: int) -> Tensor:
    """The outputs of all slots of a block below each anchor.

    A block sees the features of the positions before its anchor, strictly, and itself; no other block (DFlash, arXiv
    2602.06036, section 3). An anchor at the end of its text predicts nothing of use.

    Args:
        model: a head, bound to its target.
        features: `[b, t, F]` of the target.
        tokens: `[b, t]` of the texts.
        anchors: `[b, m]` positions of the roots; each costs as many queries as a block has slots.
        levels: tokens to predict after each.

    Returns:
        `[b, m, q, h]`, after the final norm.
    """
    (rows, length), blocks, count = tokens.shape, anchors.shape[1], model.width(levels)
    fused, order = model.fuse(features.to(model.dtype)), torch.arange(length, device=features.device)
    text, inside = model.places(order[None]), torch.arange(count, device=features.device)
    positions = anchors[..., None] + inside  # [b, m, q]
    slots = torch.arange(blocks * count, device=features.device)
    before = order < anchors.repeat_interleave(count, dim=1)[..., None]  # [b, m * q, t]
    same = slots[:, None] // count == slots // count

    def masked(is_causal: bool, window: int | None) -> Tensor:
        near = before if window is None else before & (positions.flatten(1)[..., None] - order < window)
        own = same & (slots <= slots[:, None]) if is_causal else same
        return torch.cat([near, own.expand(rows, -1, -1)], dim=-1)[:, None]

    def together(states: Tensor) -> Tensor:
        """`[b * m, heads, q, hd]` -> `[b, heads, m * q, hd]`."""
        return states.reshape(rows, blocks, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    kinds = list(zip(model.causal, model.windows, strict=True))
    masks = {kind: masked(*kind) for kind in dict.fromkeys(kinds)}

    def attend_block(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        entries = zip(model.context_entries(layer, fused, text), (keys, values), strict=True)
        keys, values = (torch.cat([of_text, together(own)], dim=2) for of_text, own in entries)
        attended = attend(together(queries), keys, values, masks[kinds[layer]])
        return attended.reshape(rows, -1, blocks, *queries.shape[2:]).transpose(1, 2).flatten(0, 1)

    roots = F.pad(tokens.gather(1, anchors).flatten()[:, None], (0, count - 1), value=model.mask_token_id)
    output = model.run_block(roots, model.places(positions.flatten(0, 1)), attend_block)
    return output.unflatten(0, (rows, blocks))


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
