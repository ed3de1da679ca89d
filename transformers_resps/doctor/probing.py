"""Measures a head's teacher-forced agreement with its target under every likely error in its config."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..heads import BoundHead, DraftHead, DraftHeadConfig
from ..heads.model import RotaryEmbedding
from ..trainers.losses import unroll
from ..verifying.forward import FeatureTap
from .diagnosis import Cell, Diagnosis, Reading, Tally
from .labelled_text import LabelledText


DEPTHS = 4
_SHIFTS = (0, 1, -1)
_BASES = (1e4, 1e6)
_BATCH_TOKENS = 1024  # one forward; the target's logits of so many are alive at once


class Probe:
    """Scores a head under several readings, on answers that come bit by bit.

    It tries the feature layers as read, one deeper and one shallower; the RoPE base as read, 1e4, 1e6 and the
    target's; and the residual of the first layer before and after its norm. Nothing is generated: at depth k the head
    reads the true text up to there, and its own output instead of the feature, as in training.

    Args:
        target: the model the head was made for.
        head: as loaded.
        readings: the configured one and some of the others; all when `None`.

    Raises:
        ValueError: the head belongs to another target.

    Source: the training-time test of EAGLE-3 (arXiv 2503.01840), section 3.2.
    """

    def __init__(self, target: PreTrainedModel, head: DraftHead, readings: Sequence[Reading] | None = None) -> None:
        self._target = target
        self._readings = list(_readings(head.config, target) if readings is None else readings)
        self._drafters = [_drafter(head, reading, target) for reading in self._readings]
        self._scores: list[list[_Scores]] = [[] for _ in self._readings]
        self._seen = 0

    @property
    def is_ready(self) -> bool:
        """Whether two answers were long enough to score, which a diagnosis needs."""
        return len(self._scores[0]) > 1

    @torch.no_grad()
    def add(self, answers: Sequence[LabelledText]) -> None:
        """Score more answers; only the target's own tokens count, and those of too short answers do not."""
        self._seen += len(answers)
        long_enough = [answer for answer in answers if len(answer.tokens) - max(answer.prompt_length, 2) >= DEPTHS]
        if not long_enough:
            return
        was_training = self._target.training
        self._target.train(False)
        try:
            found = _scores(self._target, self._readings, self._drafters, long_enough)
        finally:
            self._target.train(was_training)
        for known, new in zip(self._scores, found, strict=True):
            known += new

    def diagnosis(self) -> Diagnosis:
        """Compare the readings on all answers so far.

        Raises:
            ValueError: fewer than two answers were long enough to score.
        """
        if not self.is_ready:
            raise ValueError(
                f"{len(self._scores[0])} of {self._seen} answers have at least {DEPTHS} tokens of the target, but at "
                "least 2 are needed. Pass about 50 answers."
            )
        cells = zip(self._readings, self._scores, strict=True)
        return Diagnosis(tuple(_cell(reading, scores) for reading, scores in cells))


def diagnose(target: PreTrainedModel, head: DraftHead, answers: Sequence[LabelledText]) -> Diagnosis:
    """Compare the configured reading of `head` with its likely corrections, on answers of `target`; see `Probe`.

    Args:
        target: the model the head was made for.
        head: as loaded.
        answers: some 50 are enough.

    Raises:
        ValueError: the head belongs to another target, or fewer than two answers are long enough to score.
    """
    probe = Probe(target, head)
    probe.add(answers)
    return probe.diagnosis()


def _scores(
    target: PreTrainedModel, readings: list[Reading], drafters: list[BoundHead], answers: list[LabelledText]
) -> list[list["_Scores"]]:
    """Return the scores of all answers, for each reading."""
    layers = sorted({layer for reading in readings for layer in reading.feature_layers})
    scores: list[list[_Scores]] = [[] for _ in readings]
    with FeatureTap(target, layers) as tap:
        for batch in _batches(answers):
            tokens = batch.tokens.to(target.device)
            with tap.record() as features:
                picks = target(input_ids=tokens, use_cache=False).logits.argmax(-1)
            for drafter, reading, found in zip(drafters, readings, scores, strict=True):
                head = drafter.head
                caught = [features.caught[layer].to(head.device, head.dtype) for layer in reading.feature_layers]
                found += _score(drafter, torch.cat(caught, dim=-1), batch, picks.to(head.device))
    return scores


def _readings(config: DraftHeadConfig, target: PreTrainedModel) -> Iterator[Reading]:
    """Yield the configured reading first, then the others that this target has layers for."""
    assert config.feature_layers is not None and config.rope_parameters is not None
    layer_count = target.config.get_text_config().num_hidden_layers
    theirs = getattr(target.config.get_text_config(), "rope_parameters", None) or {}
    base = config.rope_parameters["rope_theta"]
    bases = dict.fromkeys([base, *_BASES, *(b for b in [theirs.get("rope_theta")] if b)])
    for shift in _SHIFTS:
        layers = tuple(layer + shift for layer in config.feature_layers)
        if layers[0] < 0 or layers[-1] > layer_count:
            continue
        for theta in bases:
            for is_before in (config.norm_before_residual, not config.norm_before_residual):
                yield Reading(layers, theta, is_before)


def _drafter(head: DraftHead, reading: Reading, target: PreTrainedModel) -> BoundHead:
    """Read the head so. Not prepacked: each would copy the weights, which so many rows at once do not need."""
    return BoundHead(_read_as(head, reading), target, is_prepacked=False)


def _read_as(head: DraftHead, reading: Reading) -> DraftHead:
    """Return a head with the same weights, shared and not copied, under another config."""
    config = DraftHeadConfig.from_dict(head.config.to_dict())
    config.feature_layers = list(reading.feature_layers)
    config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": reading.rope_theta}
    config.norm_before_residual = reading.norm_before_residual
    with torch.device("meta"):
        variant = DraftHead(config)
    variant.load_state_dict(head.state_dict(), assign=True)
    variant.rotary_emb = RotaryEmbedding(config).to(head.device)
    variant.train(False)
    return variant


@dataclass(frozen=True, slots=True)
class _Batch:
    """Answers padded on the right, where causal attention never looks.

    Attributes:
        tokens: `[b, t]`.
        scored: `[b, t]` bool: slots that predict a token of the answer and have all depths in the text.
    """

    tokens: Tensor
    scored: Tensor


def _batches(answers: list[LabelledText]) -> Iterator[_Batch]:
    """Yield answers of like length together, up to `_BATCH_TOKENS` tokens."""
    waiting: list[LabelledText] = []
    for answer in sorted(answers, key=lambda answer: len(answer.tokens)):
        if waiting and (len(waiting) + 1) * len(answer.tokens) > _BATCH_TOKENS:
            yield _pad(waiting)
            waiting = []
        waiting.append(answer)
    yield _pad(waiting)


def _pad(answers: list[LabelledText]) -> _Batch:
    width = max(len(answer.tokens) for answer in answers)
    tokens = torch.stack([F.pad(answer.tokens.cpu(), (0, width - len(answer.tokens))) for answer in answers])
    first = torch.tensor([max(answer.prompt_length, 2) - 2 for answer in answers])[:, None]
    end = torch.tensor([len(answer.tokens) - DEPTHS for answer in answers])[:, None]
    slots = torch.arange(width)
    return _Batch(tokens, (slots >= first) & (slots < end))


@dataclass(frozen=True, slots=True)
class _Scores:
    """How the head scores on one answer.

    Attributes:
        hits: `[depths, positions]` bool: the head's most likely token is the target's.
        log_probs: `[depths, positions]` fp32 of the target's token; 0 where the head cannot propose it.
    """

    hits: Tensor
    log_probs: Tensor


def _score(drafter: BoundHead, features: Tensor, batch: _Batch, picks: Tensor) -> Iterator[_Scores]:
    """Score the answers of a batch, one by one."""
    start = int(batch.scored.any(0).int().argmax())  # no slot before it is scored
    scored = batch.scored[:, start:].to(features.device)
    embeddings = drafter.embed(batch.tokens.to(features.device))
    slots = torch.arange(start, batch.scored.shape[1], device=features.device).expand(len(scored), -1)
    hidden = unroll(drafter.head, features, embeddings, DEPTHS, slots)  # normed [depths, b, slots, h]
    draft_ids = drafter.head.draft_token_ids
    hits, log_probs = [], []
    for depth in range(DEPTHS):
        logits = drafter.normed_logits(hidden[depth][scored])
        wanted = F.pad(picks[:, start + 1 + depth :], (0, 1 + depth))[scored]  # the token after t + 1 + depth
        rows = torch.searchsorted(draft_ids, wanted).clamp(max=len(draft_ids) - 1)
        likely = logits.gather(1, rows[:, None])[:, 0] - logits.logsumexp(-1)
        log_probs.append(likely * (draft_ids[rows] == wanted))
        hits.append(drafter.target_ids(logits.argmax(-1)) == wanted)
    counts = scored.sum(1).tolist()
    pairs = zip(torch.stack(hits).cpu().split(counts, 1), torch.stack(log_probs).cpu().split(counts, 1), strict=True)
    return (_Scores(*pair) for pair in pairs)


def _cell(reading: Reading, scores: list[_Scores]) -> Cell:
    agreement = torch.cat([score.hits for score in scores], dim=1).float().mean(1)
    tallies = tuple(
        # An accepted token needs all before it.
        Tally(score.hits.shape[1], int(score.hits.int().cumprod(0).sum()), float(score.log_probs.sum()))
        for score in scores
    )
    return Cell(reading, tuple(agreement.tolist()), tallies)
