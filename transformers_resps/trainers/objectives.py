"""Training objectives: for draft heads (a level reads earlier levels) and block heads (all levels in one pass)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drafting import TrainableSource
from ..heads import BlockHead
from ..heads.block_head import BoundBlockHead, CandidateSelector, MarkovHead
from ..heads.unrolled import run_blocks, unroll
from .features import FrozenTarget, TargetFeatures
from .head_config import DraftHeadTrainingConfig
from .losses import Teacher, pack, soft_cross_entropy


class Loss(NamedTuple):
    """The loss of a batch over k levels (drafted depths), and how often the head agrees with the target."""

    total: Tensor  # weighted sum over all levels and tokens
    losses: Tensor  # [k] sum of the unweighted losses of each level
    hits: Tensor  # [k] how often the head's best token is the target's best token
    predicted: Tensor  # [k] number of predicted tokens, including those outside the draft vocabulary


class Objective(ABC):
    """Base class: computes the training loss of one kind of head for a target."""

    def __init__(self, target: FrozenTarget, args: DraftHeadTrainingConfig) -> None:
        self.target, self.levels, self.decay = target, args.ttt_steps, args.ttt_step_decay
        self.chunk_size, self.anchor_share = args.loss_chunk_size, args.anchor_share

    @staticmethod
    @abstractmethod
    def check(head: TrainableSource, args: DraftHeadTrainingConfig) -> None:
        """Raise `ValueError` if the head cannot be trained with these settings."""

    @abstractmethod
    def __call__(
        self, head: TrainableSource, model: nn.Module, tokens: Tensor, predicted: Tensor, read: TargetFeatures
    ) -> Loss:
        """Compute the loss of right-padded texts `tokens` `[b, t]` over the tokens that `predicted` `[b, t]` marks.

        `model` is the head, wrapped for distributed training: call its forward, so that the gradient hooks run. `read`
        has the target's outputs for the texts.
        """


class LevelObjective(Objective):
    """Computes the loss of EAGLE-3's training-time test, in which every level predicts every token."""

    @staticmethod
    def check(head: TrainableSource, args: DraftHeadTrainingConfig) -> None:
        if 1 < head.depths < args.ttt_steps:
            raise ValueError(
                f"`ttt_steps` is {args.ttt_steps}, but each of these {head.depths} MTP layers drafts one level. Pass "
                f"`ttt_steps={head.depths}`."
            )

    def __call__(
        self, head: TrainableSource, model: nn.Module, tokens: Tensor, predicted: Tensor, read: TargetFeatures
    ) -> Loss:
        bound = head.bind(self.target.model, head)  # type: ignore[arg-type]  # a module, too
        rows, positions = predicted.nonzero(as_tuple=True)  # of the n predicted tokens
        levels = torch.arange(self.levels, device=positions.device)[:, None]
        slots = positions - 2 - levels  # [k, n]
        exists = slots >= 0
        token_ids = head.draft_token_ids
        learnt = torch.isin(read.picks[rows, positions - 1], token_ids)  # other picks have no loss at any level
        rows, positions, slots = rows[learnt], positions[learnt], slots[:, learnt]
        packed, columns = pack(rows, slots, read.picks.shape)
        first_pass = head.bind(self.target.model, model).run
        teacher = self.target.teacher(read.hidden[rows, positions - 1], token_ids)
        factors = (self.decay**levels * exists[:, learnt]).float()
        hidden = unroll(bound, read.features, tokens, len(levels), packed, first_pass=first_pass)
        hidden = hidden[levels, rows, columns]  # [k, m, h]
        each = [[level] for level in range(self.levels)]
        parts = []
        for one in each if bound.depths > 1 else [[*range(self.levels)]]:  # levels that share an output head
            weight, bias = bound.output_rows(one[0])
            parts.append(soft_cross_entropy(hidden[one], weight, teacher, factors[one], self.chunk_size, bias))
        loss, losses, hits = (torch.cat([part.reshape(-1) for part in same]) for same in zip(*parts, strict=True))
        return Loss(loss.sum(), losses, hits, exists.sum(-1))


class BlockObjective(Objective):
    """Computes the loss of a block head for blocks at random positions, or, in evaluation, at all positions.

    Each position of a block learns the target's distribution. A Markov head or candidate selector reads the true token
    before the position. The weight of a loss, `ttt_step_decay ** level`, is DFlash's exp(-(k - 1) / g) for the k-th
    token. Positions after the end of an answer have no loss.

    Source: DFlash (arXiv 2602.06036) section 3, DSpark (arXiv 2607.05147).
    """

    @staticmethod
    def check(head: TrainableSource, args: DraftHeadTrainingConfig) -> None:
        assert isinstance(head, BlockHead)
        if args.ttt_steps > head.config.levels:
            raise ValueError(
                f"`ttt_steps` is {args.ttt_steps}, but a block of this head drafts {head.config.levels} tokens. Pass "
                f"`ttt_steps={head.config.levels}`."
            )
        if head.config.final_logit_softcapping is not None:
            raise ValueError(
                f"This head caps its logits at {head.config.final_logit_softcapping}, and such a head is not trained "
                "here. Start from another head, or from a new one."
            )

    def __call__(
        self, head: TrainableSource, model: nn.Module, tokens: Tensor, predicted: Tensor, read: TargetFeatures
    ) -> Loss:
        assert isinstance(head, BlockHead)
        bound, correction = head.bind(self.target.model, model), head.correction
        share = self.anchor_share if model.training else 1.0
        anchors, drawn = draw_anchors(predicted, share)
        slots = run_blocks(bound, read.features, tokens, anchors, self.levels)
        hidden = bound.predicting(slots, self.levels).movedim(2, 0)  # [k, b, m, h]
        levels = torch.arange(self.levels, device=tokens.device)[:, None, None]
        texts, ends = torch.arange(len(tokens), device=tokens.device)[:, None], anchors + 1 + levels
        places = ends.clamp(max=tokens.shape[1] - 1)  # [k, b, m] positions of the predicted tokens; m blocks per text
        exists = (predicted[texts, places] & (places == ends) & drawn).cumprod(0).bool()
        before, token_ids = tokens[texts, places - 1], head.draft_token_ids
        learnt = exists & torch.isin(read.picks[texts, places - 1], token_ids)
        contexts = None
        if correction is not None:
            first = None if head.config.shifted else slots[:, :, 0].flatten(0, 1)
            contexts = contexts_of(correction, hidden.flatten(1, 2), before.flatten(1), first).view(*before.shape, -1)
        teacher, parts = self.target.teacher(read.hidden[texts, places - 1], token_ids), []
        for level, rows in enumerate(learnt):
            of_level = replace(teacher, hidden=teacher.hidden[level][rows])
            context = None if contexts is None else contexts[level][rows]
            found = self._of_slots(bound, hidden[level][rows], context, before[level][rows], of_level)
            parts.append((found[0] * self.decay**level / share, *found[1:]))
        loss, losses, hits = (torch.cat([part.reshape(-1) for part in same]) for same in zip(*parts, strict=True))
        return Loss(loss.sum(), losses, hits, exists.sum((1, 2)))

    def _of_slots(
        self, bound: BoundBlockHead, states: Tensor, context: Tensor | None, before: Tensor, teacher: Teacher
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute n outputs' loss at a level: `soft_cross_entropy`, plus losses of a selector or confidence head."""
        head, normed, (weight, bias) = bound.head, bound.normed(states), bound.output_rows()
        correction = head.correction
        added = (context, correction.table) if context is not None and isinstance(correction, MarkovHead) else None
        ones, pair = normed.new_ones(1, len(normed), dtype=torch.float32), added and (added[0][None], added[1])
        total, losses, hits = soft_cross_entropy(normed[None], weight, teacher, ones, self.chunk_size, bias, pair)
        if isinstance(correction, CandidateSelector):
            assert context is not None
            found = logits_of(normed, weight, bias, self.chunk_size)
            total = total + selection_loss(found, teacher, correction, context).sum()
        if head.config.confidence:
            wanted = shared_probability(logits_of(normed, weight, bias, self.chunk_size), teacher, added)
            sure = head.confidence(states, None if correction is None else correction.before(before))
            total = total + F.binary_cross_entropy_with_logits(sure, wanted, reduction="sum")
        return total, losses, hits


def draw_anchors(predicted: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw a `share` of the positions at which a block can start; a share of 1 takes all, without random numbers.

    A block can start at a token if it and the next one are `predicted` (`[b, t]` bool). Returns m positions of each
    text, `[b, m]`, and a mask `[b, m]` that is false at the padding of texts with fewer positions.
    """
    may = predicted[:, :-1] & predicted[:, 1:]
    counts = (may.sum(-1, keepdim=True) * share).ceil().long()
    order = torch.zeros_like(may, dtype=torch.float32) if share == 1 else torch.rand_like(may, dtype=torch.float32)
    anchors = order.masked_fill(~may, 2.0).argsort(dim=-1, stable=True)[:, : max(int(counts.max()), 1)]
    return anchors, torch.arange(anchors.shape[1], device=anchors.device) < counts


def contexts_of(
    correction: MarkovHead | CandidateSelector, hidden: Tensor, before: Tensor, first: Tensor | None
) -> Tensor:
    """Compute context vectors `[k, n, r]` for n blocks; times the correction's table `[d, r]`, they adjust the logits.

    `hidden` `[k, n, h]` has the outputs that predict the tokens of k levels, `before` `[k, n]` the true tokens before
    these, and `first` `[n, h]` the outputs at the blocks' roots, or `None` if the roots predict the first level.
    """
    rows = correction.before(before)
    if not isinstance(correction, MarkovHead) or correction.kind != "rnn":
        return correction.context(rows[:, :, None], hidden)[:, :, 0]
    state, contexts = correction.state_at(rows[0, :, None], first), []
    for states, token_rows in zip(hidden, rows, strict=True):
        context, state = correction.step(token_rows[:, None], states, state)
        contexts.append(context[:, 0])
    return torch.stack(contexts)


Logits = Iterator[tuple[slice, Tensor]]  # yields a slice that selects c of n outputs, and their logits [c, d]


@torch.no_grad()
def logits_of(normed: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int) -> Logits:
    """Yield slices of at most `chunk_size` of the n normed outputs `[n, h]`, each with the head's fp32 logits."""
    for start in range(0, max(len(normed), 1), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, F.linear(normed[rows].to(weight.dtype), weight, bias).float()


def selection_loss(found: Logits, teacher: Teacher, selector: CandidateSelector, contexts: Tensor) -> Tensor:
    """Compute the cross entropies `[n]` of a selector's scores and the target, over the head's likeliest tokens.

    The target's probabilities are not renormalised over these tokens. `contexts` `[n, r]` come from `contexts_of`.
    """
    losses = []
    for rows, logits in found:
        base, candidates = logits.topk(selector.candidates, dim=-1)
        wanted = teacher.probabilities(rows).gather(1, candidates)
        successors = F.embedding(candidates, selector.table)
        scores = base + (successors @ contexts[rows, :, None].to(successors.dtype))[..., 0].float()
        losses.append(-(wanted * scores.log_softmax(-1)).sum(-1))
    return torch.cat(losses)


@torch.no_grad()
def shared_probability(found: Logits, teacher: Teacher, added: tuple[Tensor, Tensor] | None) -> Tensor:
    """Compute a confidence head's labels, fp32 `[n]`: sums of min(p, q) for the probabilities of head and target.

    `added` is as in `soft_cross_entropy`, for one level. Source: DSpark (arXiv 2607.05147).
    """
    shares = []
    for rows, logits in found:
        if added is not None:
            logits += F.linear(added[0][rows].to(added[1].dtype), added[1]).float()
        shares.append(torch.minimum(logits.softmax(-1), teacher.probabilities(rows)).sum(-1))
    return torch.cat(shares)
