"""Collects the decisions from which a policy learns, on recorded texts or by timed decoding.

Tensor shapes: n decisions, a actions (tree shapes that the policy can choose), F width of the features.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import truediv
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..generation.mixin import ReSpSGenerationMixin
from ..heads import BlockHead, DraftHead
from ..policies.base import Observation, Policy
from ..policies.resps import ReSpSPolicy
from ..replay import HeldOutcomes, OutcomeTable
from ..telemetry.report import StepRecord
from ..tree import TreeShape


@dataclass(frozen=True, slots=True)
class Decisions:
    """Tree shapes (actions) that a policy chose, and their results, ordered by text and step."""

    features: Tensor  # [n, F]
    actions: Tensor  # [n]
    log_probs: Tensor  # [n] log probabilities of the actions when they were taken
    outcomes: HeldOutcomes  # [n] results of the actions
    ends: Tensor  # [n] bool, true for the last decision of a text
    all_outcomes: HeldOutcomes | None = None  # [n, a] results of every action, if known
    oracle_seconds: float | None = None  # least possible seconds of these texts, if known
    dropped: int = 0  # number of decisions that were left out because the clock jumped or stood still

    def __len__(self) -> int:
        return len(self.actions)


class Rollouts(ABC):
    """Base class of `ReplayRollouts` and `LiveRollouts`: collects a policy's decisions on texts, and their results."""

    knows_all_outcomes = False  # whether decisions come with the result of every action

    @property
    def best_fixed_rate(self) -> float:
        """Tokens per second over all texts if every step uses the best fixed tree shape; 0 if unknown."""
        return 0.0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of texts."""

    @abstractmethod
    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        """Decode or replay `texts` random texts, or all if there are fewer, and return the decisions of `policy`.

        Each chosen action is kept for `persistence` steps. It is the likeliest if `greedy`, else drawn with
        `generator`, which is on the CPU. The persistence and sampling in `policy.config` are ignored.
        """


def _taken(logits: Tensor, generator: torch.Generator | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw actions `[n]` from logits `[n, a]`, or take the likeliest without `generator`; also return log probs."""
    log_probs = (logits / temperature).log_softmax(-1)
    if generator is None:
        actions = logits.argmax(-1)
    else:
        actions = torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)
    return actions, log_probs.gather(1, actions[:, None]).squeeze(1)


class ReplayRollouts(Rollouts):
    """Collects decisions on recorded texts: no model runs, and the same seed gives the same decisions."""

    knows_all_outcomes = True

    def __init__(self, table: OutcomeTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @property
    def best_fixed_rate(self) -> float:
        return self.table.best_fixed_rate

    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        chosen = torch.randperm(len(self.table), generator=generator)[:texts]
        return self.follow(policy, chosen, persistence, None if greedy else generator)

    @torch.no_grad()
    def follow(
        self,
        policy: ReSpSPolicy,
        texts: Tensor,
        persistence: int,
        generator: torch.Generator | None,
        *,
        temperature: float = 1.0,
    ) -> Decisions:
        """Replay the texts with the indices `texts` at once; if `generator` is `None`, take the likeliest actions."""
        replayed = (self.table.features.shape[1], self.table.action_count)
        needed = (policy.config.feature_size, len(policy.config.grid))
        if replayed != needed:
            raise ValueError(
                f"The replayed texts have features of width {replayed[0]} and {replayed[1]} actions, but the policy "
                f"reads width {needed[0]} and has {needed[1]} actions. Record the texts with the policy's own head, "
                "and make their outcomes for `policy.config.grid`."
            )
        policy.check_identity(grid=self.table.grid)
        held = self.table.held(persistence)
        positions, stops = self.table.starts[texts], self.table.stops[texts]
        lanes = torch.arange(len(texts))
        rounds: list[tuple[Tensor, ...]] = []
        while len(lanes):
            logits = policy.network.logits(self.table.features[positions]).cpu()
            actions, log_probs = _taken(logits, generator, temperature)
            ends_at = positions + held.emitted[positions, actions].long()
            alive = ends_at < stops
            rounds.append((lanes, positions, actions, log_probs, ~alive))
            positions, stops, lanes = ends_at[alive], stops[alive], lanes[alive]
        order, positions, actions, log_probs, ends = (torch.cat(parts) for parts in zip(*rounds, strict=True))
        order = order.sort(stable=True).indices  # by text, and within a text by step
        positions, actions, log_probs, ends = (part[order] for part in (positions, actions, log_probs, ends))
        every, oracle = held.at(positions), float(self.table.best_seconds[texts].sum())
        taken = every.of_actions(actions)
        return Decisions(self.table.features[positions], actions, log_probs, taken, ends, every, oracle)


@dataclass(slots=True)
class _Decision:
    features: Tensor  # [1, F]
    action: int
    log_prob: float
    records: list[StepRecord] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds of each step


class DecisionRecorder(Policy):
    """Chooses actions by the network of `policy`, each for `persistence` steps, and stores these steps' records.

    The code of Re-SpS instead credits a step to the next decision, and adds an observation of zeros once per text.
    """

    def __init__(self, policy: ReSpSPolicy, persistence: int, generator: torch.Generator | None) -> None:
        self.decisions: list[_Decision] = []
        self._policy, self._persistence, self._generator = policy, persistence, generator

    def choose(self, observation: Observation) -> TreeShape:
        if observation.step == 0 or len(self.decisions[-1].records) >= self._persistence:
            features = self._policy.checked(observation.features)
            with torch.no_grad():
                action, log_prob = _taken(self._policy.network.logits(features).cpu(), self._generator)
            self.decisions.append(_Decision(features.detach().cpu(), int(action), float(log_prob)))
        return self._policy.config.grid[self.decisions[-1].action]

    def observe(self, record: StepRecord) -> None:
        self.decisions[-1].records.append(record)


_JUMP = 10.0  # A step that takes this many times its shape's usual seconds shows that the clock jumped.
_REMEMBERED = 64  # Number of newest steps per shape from which its usual seconds are computed.


class LiveRollouts(Rollouts):
    """Collects decisions by decoding with an attached model, timed on this machine.

    With `includes_drafting=False` a step's time excludes drafting, as in the code of Re-SpS. Deep trees then seem to
    cost nothing, so use this only for ablations. `generation` holds arguments of `generate`, such as `max_new_tokens`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: DraftHead | BlockHead,
        prompts: Sequence[Tensor],
        *,
        includes_drafting: bool = True,
        **generation: Any,
    ) -> None:
        if not prompts:
            raise ValueError("Got no prompts, but live rollouts decode some. Pass a dataset with prompts.")
        if not isinstance(target, ReSpSGenerationMixin) or not isinstance(unwrapped(head), DraftHead | BlockHead):
            raise ValueError(
                "Live rollouts need an attached target and a `DraftHead` or `BlockHead`, got "
                f"{type(target).__name__} and {type(head).__name__}. Pass `attach(model)` and the head of that model."
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
        """Collect decisions as in `Rollouts.collect`; raise `ValueError` if no decision took a plausible time."""
        chosen = torch.randperm(len(self._prompts), generator=generator)[:texts].tolist()
        kept, ends, decided = list[_Decision](), list[bool](), 0
        for index in chosen:
            decisions = self._decode(index, DecisionRecorder(policy, persistence, None if greedy else generator))
            timed = [one for one in decisions if self._is_timed(one)]
            decided += len(decisions)
            kept += timed
            ends += [one is timed[-1] for one in timed]
        if not kept:
            raise ValueError(
                f"None of the {decided} decisions over {len(chosen)} prompts took a positive, steady time. Check the "
                "clock of this machine, or pass prompts with longer answers."
            )
        emitted = [[record.emitted_total for record in decision.records] for decision in kept]
        rates = [sum(map(truediv, tokens, one.times)) / len(tokens) for tokens, one in zip(emitted, kept, strict=True)]
        return Decisions(
            torch.cat([decision.features for decision in kept]),
            torch.tensor([decision.action for decision in kept]),
            torch.tensor([decision.log_prob for decision in kept]),
            HeldOutcomes(
                torch.tensor(list(map(sum, emitted)), dtype=torch.float64),
                torch.tensor([sum(one.times) for one in kept], dtype=torch.float64),
                torch.tensor(rates, dtype=torch.float64),
            ),
            torch.tensor(ends),
            dropped=decided - len(kept),
        )

    def _decode(self, index: int, recorder: DecisionRecorder) -> list[_Decision]:
        """Decode prompt number `index` and return the decisions that were used for at least one step."""
        prompt = self._prompts[index][None].to(self._target.device)
        mask = torch.ones_like(prompt)
        self._target.generate(
            prompt, attention_mask=mask, assistant_model=self._head, policy=recorder, **self._generation
        )
        return [decision for decision in recorder.decisions if decision.records]

    def _is_timed(self, decision: _Decision) -> bool:
        """Store the steps' seconds in `decision`; return false if the clock stood still, ran backwards or jumped."""
        for record in decision.records:
            seconds = record.step_seconds - (0.0 if self._includes_drafting else record.draft_seconds)
            if not (math.isfinite(seconds) and seconds > 0):
                return False
            usual = self._usual[record.shape]
            jumped = bool(usual) and seconds > _JUMP * median(usual)
            usual.append(seconds)
            if jumped:
                return False
            decision.times.append(seconds)
        return True
