"""Decisions to learn from, taken in real decoding: `generate` runs and its steps are timed."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..generation.mixin import ReSpSGenerationMixin
from ..head import DraftHead
from ..policy import Observation, Policy, ReSpSPolicy
from ..replay import HeldOutcomes
from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .decisions import Decisions


_JUMP = 10.0  # times a shape's usual seconds: the machine slept, or the clock was set
_REMEMBERED = 64  # steps per shape


@dataclass(slots=True)
class _Decision:
    features: Tensor  # [1, F]
    action: int
    log_prob: float
    records: list[StepRecord] = field(default_factory=list)


class DecisionRecorder(Policy):
    """Decides with a policy's network, holds each decision, and credits every step to the decision that shaped it.

    The reference code of Re-SpS credits a step to the next decision, and adds an observation of zeros once per text.
    Here `observe` follows the step that `choose` shaped, so neither can happen.

    Args:
        policy: its network decides.
        persistence: steps that a decision is held.
        generator: draws the actions; `None` takes the likeliest.
    """

    def __init__(self, policy: ReSpSPolicy, persistence: int, generator: torch.Generator | None) -> None:
        self.decisions: list[_Decision] = []
        self._policy, self._persistence, self._generator = policy, persistence, generator

    def choose(self, observation: Observation) -> TreeShape:
        if observation.step == 0 or len(self.decisions[-1].records) >= self._persistence:
            self.decisions.append(self._decide(observation.features))
        return self._policy.config.grid[self.decisions[-1].action]

    def observe(self, record: StepRecord) -> None:
        self.decisions[-1].records.append(record)

    @torch.no_grad()
    def _decide(self, features: Tensor | None) -> _Decision:
        features = self._policy.checked(features)
        log_probs = self._policy.network.logits(features).log_softmax(-1).cpu()  # [1, a]
        if self._generator is None:
            action = int(log_probs.argmax())
        else:
            action = int(torch.multinomial(log_probs.exp(), 1, generator=self._generator))
        return _Decision(features.detach().cpu(), action, float(log_probs[0, action]))


class LiveRollouts:
    """Rollouts from real decoding, timed on this machine.

    Args:
        target: an attached model.
        head: its draft head.
        prompts: token ids `[s]` each.
        includes_drafting: count observing, choosing and drafting in a step's time. The code of Re-SpS does not, so
            deep trees look free to it: turn it off for ablations only.
        generation: passed to `generate`, for example `max_new_tokens`.

    Raises:
        ValueError: there are no prompts, the target is not attached, or the head is not a `DraftHead`.
    """

    knows_all_outcomes = False

    def __init__(
        self,
        target: PreTrainedModel,
        head: DraftHead,
        prompts: Sequence[Tensor],
        *,
        includes_drafting: bool = True,
        **generation: Any,
    ) -> None:
        if not prompts:
            raise ValueError("Got no prompts, but live rollouts decode some. Pass a dataset with prompts.")
        if not isinstance(target, ReSpSGenerationMixin) or not isinstance(unwrapped(head), DraftHead):
            raise ValueError(
                f"Live rollouts need an attached target and a `DraftHead`, got {type(target).__name__} and "
                f"{type(head).__name__}. Pass `attach(model)` and the head of that model."
            )
        self._target: Any = target
        self._head, self._prompts = head, prompts
        self._includes_drafting = includes_drafting
        self._generation = generation
        self._usual: dict[TreeShape, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def __len__(self) -> int:
        return len(self._prompts)

    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        """As `Rollouts.collect`.

        Raises:
            ValueError: no step took a plausible time.
        """
        parts = []
        for index in torch.randperm(len(self._prompts), generator=generator)[:texts].tolist():
            recorder = DecisionRecorder(policy, persistence, None if greedy else generator)
            prompt = self._prompts[index][None].to(self._target.device)
            self._target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                assistant_model=self._head,
                policy=recorder,
                **self._generation,
            )
            parts.append(self._packed([decision for decision in recorder.decisions if decision.records]))
        if not sum(map(len, parts)):
            raise ValueError(
                f"None of the {sum(part.dropped for part in parts)} decisions over {len(parts)} prompts took a "
                "positive, steady time. Check the clock of this machine, or pass prompts with longer answers."
            )
        return Decisions.joined(parts)

    def _packed(self, decisions: list[_Decision]) -> Decisions:
        """The decisions of one text whose steps all took a plausible time."""
        kept = [(one, times) for one in decisions if (times := self._believable(one.records)) is not None]
        width = decisions[0].features.shape[-1] if decisions else 0
        ends = torch.zeros(len(kept), dtype=torch.bool)
        ends[-1:] = True
        tokens = [[record.emitted_total for record in one.records] for one, _ in kept]
        rates = [
            sum(e / s for e, s in zip(emitted, times, strict=True)) / len(times)
            for emitted, (_, times) in zip(tokens, kept, strict=True)
        ]
        return Decisions(
            torch.cat([one.features for one, _ in kept]) if kept else torch.zeros(0, width),
            torch.tensor([one.action for one, _ in kept], dtype=torch.long),
            torch.tensor([one.log_prob for one, _ in kept]),
            HeldOutcomes(
                torch.tensor([float(sum(emitted)) for emitted in tokens], dtype=torch.float64),
                torch.tensor([sum(times) for _, times in kept], dtype=torch.float64),
                torch.tensor(rates, dtype=torch.float64),
            ),
            ends,
            dropped=len(decisions) - len(kept),
        )

    def _believable(self, records: list[StepRecord]) -> list[float] | None:
        """Seconds of each step, or `None` when one of them stood still, ran backwards or jumped."""
        times = []
        for record in records:
            seconds = record.step_seconds - (0.0 if self._includes_drafting else record.draft_seconds)
            if not (math.isfinite(seconds) and seconds > 0):
                return None
            usual = self._usual[record.shape]
            jumped = bool(usual) and seconds > _JUMP * median(usual)
            usual.append(seconds)
            if jumped:
                return None
            times.append(seconds)
        return times
