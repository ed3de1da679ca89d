"""Does a head read its target as it was trained to? Teacher-forced agreement under every likely slip in its file.

Knows models and token ids: nothing of files, tokenizers or terminals.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .features import FeatureTap
from .head import BoundHead, DraftHead, DraftHeadConfig
from .head.rotary import RotaryEmbedding
from .trainers.training_time_test import unroll


DEPTHS = 4
_SHIFTS = (0, 1, -1)
_BASES = (1e4, 1e6)
_SURE = 3.0  # standard errors; more than two because the best of some twenty cells is looked at
_LEAST_GAIN = 0.01  # accepted tokens per chain: less is not worth another file
_BATCH_TOKENS = 1024  # one forward; the target's logits of so many are alive at once
_STRANGER = 0.05  # agreement at depth 1 below which a head knows nothing of its target


@dataclass(frozen=True, slots=True)
class Answer:
    """A text of which the target wrote the end.

    Attributes:
        tokens: `[t]` target vocabulary ids.
        prompt_length: how many of them were given.
    """

    tokens: Tensor
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read the head's file, as the overrides of `DraftHead.from_pretrained`."""

    feature_layers: tuple[int, ...]
    rope_theta: float
    norm_before_residual: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """How well the head agrees with its target under one reading.

    Attributes:
        reading: which.
        agreement: of each depth from 1, the share of positions where the head's most likely token is the target's.
        accepted: drafted tokens a chain of that many would keep, per position.
        by_answer: of each answer, its kept tokens and its positions.
    """

    reading: Reading
    agreement: tuple[float, ...]
    accepted: float
    by_answer: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        cells: all readings, the configured one first.
    """

    cells: tuple[Cell, ...]

    @property
    def configured(self) -> Cell:
        return self.cells[0]

    @cached_property
    def best(self) -> Cell:
        """The reading that accepts most; of those that differ from it by noise only, the one nearest to the file's."""
        most = max(self.cells, key=lambda cell: cell.accepted)
        equal = [cell for cell in self.cells if not self._is_sure(most, cell)]
        return min(equal, key=lambda cell: (self._changes(cell), -cell.accepted))

    def _is_sure(self, better: Cell, worse: Cell) -> bool:
        gain, error = self.gain(better, worse)
        return gain > max(_SURE * error, _LEAST_GAIN)

    def _changes(self, cell: Cell) -> int:
        ours, theirs = self.configured.reading, cell.reading
        return sum(getattr(ours, field.name) != getattr(theirs, field.name) for field in fields(Reading))

    def gain(self, cell: Cell, over: Cell | None = None) -> tuple[float, float]:
        """Accepted tokens per position above another cell (the configured one), and the standard error of that."""
        other = over or self.configured
        counts = [count for _, count in cell.by_answer]
        differences = [ours - theirs for (ours, _), (theirs, _) in zip(cell.by_answer, other.by_answer, strict=True)]
        total, answers = sum(counts), len(counts)
        mean = sum(differences) / total
        spread = sum((d - mean * c) ** 2 for d, c in zip(differences, counts, strict=True))
        return mean, math.sqrt(spread * answers / (answers - 1)) / total

    @property
    def is_healthy(self) -> bool:
        """No other reading is better beyond noise."""
        return self.best is self.configured

    @property
    def overrides(self) -> dict[str, Any]:
        """What to pass to `DraftHead.from_pretrained`; empty when healthy."""
        best, configured = self.best.reading, self.configured.reading
        found: dict[str, Any] = {}
        if best.feature_layers != configured.feature_layers:
            found["feature_layers"] = list(best.feature_layers)
        if best.rope_theta != configured.rope_theta:
            found["rope_theta"] = best.rope_theta
        if best.norm_before_residual != configured.norm_before_residual:
            found["norm_before_residual"] = best.norm_before_residual
        return found

    @property
    def verdict(self) -> str:
        """One or two sentences for people."""
        configured = f"{self.configured.accepted:.2f} of {DEPTHS} drafted tokens accepted"
        if not self.is_healthy:
            passed = ", ".join(f"{key}={value!r}" for key, value in self.overrides.items())
            gain, error = self.gain(self.best)
            return (
                f"The head is read wrongly: {configured} as configured, {self.best.accepted:.2f} with `{passed}` "
                f"(gain {gain:.2f} +- {error:.2f}). Pass `DraftHead.from_pretrained(..., {passed})`."
            )
        if self.configured.agreement[0] < _STRANGER:
            return (
                f"No reading makes this head agree with this target ({configured}). It was trained for another "
                "target, or hardly at all."
            )
        return f"The head is read as it was trained: {configured}, and no other reading is better."


@torch.no_grad()
def write_answers(
    target: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 10
) -> list[Answer]:
    """Let `target` answer prompts of `[t]` token ids greedily, a batch at a time."""
    settings = target.generation_config
    eos = settings.eos_token_id if settings is not None else None
    stops = torch.tensor(eos if isinstance(eos, list) else [] if eos is None else [eos], dtype=torch.long)
    answers = []
    for first in range(0, len(prompts), batch):
        some = [prompt.to(target.device) for prompt in prompts[first : first + batch]]
        width = max(len(prompt) for prompt in some)
        ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in some])
        mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in some])
        written = target.generate(  # type: ignore[operator]  # PreTrainedModel does not declare GenerationMixin
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
        ).cpu()
        for row, prompt in zip(written, some, strict=True):
            ends = torch.isin(row[width:], stops).nonzero()
            end = width + int(ends[0]) + 1 if len(ends) else len(row)
            answers.append(Answer(row[width - len(prompt) : end], len(prompt)))
    return answers


@torch.no_grad()
def diagnose(target: PreTrainedModel, head: DraftHead, answers: Sequence[Answer]) -> Diagnosis:
    """Compare the configured reading of `head` with its likely corrections, on answers of `target`.

    Tried are feature layers as read, one deeper, one shallower; the RoPE base as read, 1e4, 1e6 and the target's own;
    and the residual of the first layer before and after its norm. Nothing is generated: at depth k the head reads the
    true text up to there and its own output in place of the feature, as in training.

    Args:
        target: the model the head was made for.
        head: as loaded.
        answers: some 50 are enough; only the target's own tokens are scored.

    Raises:
        ValueError: the head is another target's; or there are fewer than two answers long enough to score.

    Source: the training-time test of EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    long_enough = [answer for answer in answers if len(answer.tokens) - max(answer.prompt_length, 2) >= DEPTHS]
    if len(long_enough) < 2:
        raise ValueError(
            f"{len(long_enough)} of {len(answers)} answers have at least {DEPTHS} tokens of the target, but at least "
            "2 are needed to tell a difference from noise. Pass some 50 answers."
        )
    was_training = target.training
    target.train(False)
    readings = list(_readings(head.config, target))
    drafters = [BoundHead(_read_as(head, reading), target) for reading in readings]
    layers = sorted({layer for reading in readings for layer in reading.feature_layers})
    hits: list[list[Tensor]] = [[] for _ in readings]
    with FeatureTap(target, layers) as tap:
        for batch in _batches(long_enough):
            tokens = batch.tokens.to(target.device)
            with tap.record() as features:
                picks = target(input_ids=tokens, use_cache=False).logits.argmax(-1)
            for drafter, reading, found in zip(drafters, readings, hits, strict=True):
                read = torch.cat([features.caught[layer] for layer in reading.feature_layers], dim=-1)
                found += _hits(drafter, read.to(drafter.head.dtype), batch, picks)
    target.train(was_training)
    return Diagnosis(tuple(_cell(reading, found) for reading, found in zip(readings, hits, strict=True)))


def _readings(config: DraftHeadConfig, target: PreTrainedModel) -> Iterator[Reading]:
    """The configured reading first; then the others that this target has layers for."""
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


def _read_as(head: DraftHead, reading: Reading) -> DraftHead:
    """The same weights, shared and not copied, under another config."""
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


def _batches(answers: list[Answer]) -> Iterator[_Batch]:
    """Answers of like length together, up to `_BATCH_TOKENS` tokens."""
    waiting: list[Answer] = []
    for answer in sorted(answers, key=lambda answer: len(answer.tokens)):
        if waiting and (len(waiting) + 1) * len(answer.tokens) > _BATCH_TOKENS:
            yield _pad(waiting)
            waiting = []
        waiting.append(answer)
    yield _pad(waiting)


def _pad(answers: list[Answer]) -> _Batch:
    width = max(len(answer.tokens) for answer in answers)
    tokens = torch.stack([F.pad(answer.tokens.cpu(), (0, width - len(answer.tokens))) for answer in answers])
    first = torch.tensor([max(answer.prompt_length, 2) - 2 for answer in answers])[:, None]
    end = torch.tensor([len(answer.tokens) - DEPTHS for answer in answers])[:, None]
    slots = torch.arange(width)
    return _Batch(tokens, (slots >= first) & (slots < end))


def _hits(drafter: BoundHead, features: Tensor, batch: _Batch, picks: Tensor) -> list[Tensor]:
    """Of each answer, `[depths, positions]` bool: the head's most likely token is the target's."""
    start = int(batch.scored.any(0).int().argmax())  # no slot before it is scored
    scored = batch.scored[:, start:].to(features.device)
    embeddings = drafter.embed(batch.tokens.to(features.device))
    hidden = unroll(drafter.head, features, embeddings, DEPTHS, start)  # normed [depths, b, slots, h]
    weight = drafter.output_weight
    levels = []
    for depth in range(DEPTHS):
        logits = hidden[depth][scored].to(weight.dtype) @ weight.T
        wanted = F.pad(picks[:, start + 1 + depth :], (0, 1 + depth))[scored]  # the token after t + 1 + depth
        levels.append(drafter.target_ids(logits.argmax(-1)) == wanted)
    return list(torch.stack(levels).cpu().split(scored.sum(1).tolist(), dim=1))


def _cell(reading: Reading, hits: list[Tensor]) -> Cell:
    together = torch.cat(hits, dim=1).float()
    kept = [hit.int().cumprod(0).sum() for hit in hits]  # an accepted token needs all before it
    by_answer = tuple((int(k), hit.shape[1]) for k, hit in zip(kept, hits, strict=True))
    accepted = sum(k for k, _ in by_answer) / together.shape[1]
    return Cell(reading, tuple(together.mean(1).tolist()), accepted, by_answer)
