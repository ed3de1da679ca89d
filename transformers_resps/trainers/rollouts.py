"""What a policy decided over some texts, and what came of it: the data that `PolicyTrainer` learns from.

Tensor shapes: n decisions, a actions, F width of the features.

What an outcome is worth to a policy that learns: by default, what it adds to total tokens over total seconds.

Where decisions to learn from come from; here on replayed texts, without a model and without a clock.

Decisions to learn from, taken in real decoding: `generate` runs and its steps are timed.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..generation.mixin import ReSpSGenerationMixin
from ..heads import DraftHead
from ..policies import Observation, Policy, ReSpSPolicy
from ..replay import HeldOutcomes, Oracle, OutcomeTable
from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .ppo import gains


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions in the order they were taken, text after text.

    Attributes:
        features: `[n, F]`.
        actions: `[n]`.
        log_probs: `[n]` of the actions, when they were taken.
        outcomes: `[n]` of the actions taken.
        ends: `[n]` bool, the last decision of a text.
        all_outcomes: `[n, a]` of every action, where known.
        oracle_seconds: the least that these texts could have taken, where known.
        dropped: decisions left out because the clock had jumped or stood still.
    """

    features: Tensor
    actions: Tensor
    log_probs: Tensor
    outcomes: HeldOutcomes
    ends: Tensor
    all_outcomes: HeldOutcomes | None = None
    oracle_seconds: float | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def tokens_per_second(self) -> float:
        return float(self.outcomes.emitted.sum() / self.outcomes.seconds.sum())

    @property
    def seconds_of_texts(self) -> Tensor:
        """`[texts]` fp64."""
        texts = torch.cat([torch.zeros(1, dtype=torch.long), self.ends.long().cumsum(0)])[:-1]
        return torch.zeros(int(self.ends.sum()), dtype=torch.float64).index_add(
            0, texts, self.outcomes.seconds.double()
        )

    @property
    def oracle_regret(self) -> float | None:
        """Time lost compared with the fastest sequence of shapes, as a share of the fastest time."""
        if self.oracle_seconds is None:
            return None
        return float(self.outcomes.seconds.sum()) / self.oracle_seconds - 1

    @classmethod
    def joined(cls, parts: "Sequence[Decisions]") -> "Decisions":
        """All decisions of `parts`, whose outcomes of other actions are unknown."""
        outcomes = [part.outcomes for part in parts]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.actions for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            HeldOutcomes(*(torch.cat([getattr(part, f.name) for part in outcomes]) for f in fields(HeldOutcomes))),
            torch.cat([part.ends for part in parts]),
            dropped=sum(part.dropped for part in parts),
        )


RewardFunc = Callable[..., Tensor]


def tokens_per_second(*, emitted: Tensor, seconds: Tensor, rate: float, persistence: int, **_: Any) -> Tensor:
    """Tokens minus what the policy emits in the same time on average, per step; see `ppo.gains`."""
    return gains(emitted, seconds, rate, persistence)


def mean_rate(*, mean_rates: Tensor, **_: Any) -> Tensor:
    """Mean of the steps' tokens per second, the reward of Re-SpS (arXiv 2601.12212, equations 3 and 5)."""
    return mean_rates


REWARD_FUNCS: dict[str, RewardFunc] = {"tokens_per_second": tokens_per_second, "mean_rate": mean_rate}


def reward_func_of(given: str | RewardFunc) -> RewardFunc:
    """The function that a name stands for; a function stands for itself.

    Raises:
        ValueError: it is neither.
    """
    found = REWARD_FUNCS.get(given) if isinstance(given, str) else given
    if not callable(found):
        raise ValueError(
            f"`reward_func` is {given!r}, but must be {' or '.join(map(repr, REWARD_FUNCS))}, or a function of "
            "`emitted`, `seconds`, `mean_rates`, `rate` and `persistence`."
        )
    return found


def rewards_of(func: RewardFunc, outcomes: HeldOutcomes, rate: float, persistence: int) -> Tensor:
    """What outcomes are worth: fp64 of their shape.

    Args:
        func: called with `emitted`, `seconds` and `mean_rates` of `outcomes`, and the other two.
        outcomes: `[n]` of the actions taken, or `[n, a]` of every action.
        rate: tokens per second of the policy.
        persistence: steps that an action is held.

    Raises:
        ValueError: it returned something else.
    """
    given = {"emitted": outcomes.emitted, "seconds": outcomes.seconds, "mean_rates": outcomes.mean_rates}
    rewards: Any = func(**given, rate=rate, persistence=persistence)
    is_fit = isinstance(rewards, Tensor) and rewards.shape == outcomes.emitted.shape
    if not is_fit or not bool(torch.isfinite(rewards).all()):
        came = f"shape {list(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
        raise ValueError(
            f"`reward_func` returned {came if not is_fit else 'infinite values or NaN'} for outcomes of shape "
            f"{list(outcomes.emitted.shape)}, but must return a finite tensor of that shape: one reward per outcome."
        )
    return cast(Tensor, rewards).double()


class Rollouts(Protocol):
    """Where a trainer of policies gets its decisions from: `ReplayRollouts` or `LiveRollouts`."""

    def __len__(self) -> int:
        """How many texts there are to decide over."""
        ...

    @property
    def knows_all_outcomes(self) -> bool:
        """Whether decisions come with the outcome of every action."""
        ...

    def collect(
        self, policy: ReSpSPolicy, texts: int, persistence: int, generator: torch.Generator, *, greedy: bool = False
    ) -> Decisions:
        """Decide over some texts, chosen by `generator`.

        Args:
            policy: its network decides; its own persistence and sampling are not used.
            texts: how many; all if there are fewer.
            persistence: steps that a decision is held.
            generator: for all random numbers, on the CPU.
            greedy: take the likeliest action instead of drawing.

        Returns:
            The decisions and their outcomes, text after text.
        """
        ...


class ReplayRollouts:
    """Rollouts on recorded texts: no model runs, and the same seed gives the same decisions.

    Args:
        table: outcomes of every action at every position.
    """

    knows_all_outcomes = True

    def __init__(self, table: OutcomeTable) -> None:
        self.table = table
        self.oracle = Oracle(table)

    def __len__(self) -> int:
        return len(self.table)

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
        """Decide over `texts` from their beginning to their end, all of them side by side.

        Args:
            policy: its network decides.
            texts: their indices.
            persistence: steps that a decision is held.
            generator: draws the actions; `None` takes the likeliest.
            temperature: divides the logits before a draw.

        Returns:
            The decisions and their outcomes, text after text.

        Raises:
            ValueError: the table was made with another grid or another head than the policy.
        """
        self._check(policy)
        held = self.table.held(persistence)
        places, stops = self.table.starts[texts], self.table.stops[texts]
        lanes = torch.arange(len(texts))
        taken: list[tuple[Tensor, ...]] = []
        while len(lanes):
            logits = policy.network.logits(self.table.features[places]).cpu()
            log_probs = (logits / temperature).log_softmax(-1)
            actions = logits.argmax(-1) if generator is None else _draw(log_probs, generator)
            ends_at = places + held.emitted[places, actions].long()
            alive = ends_at < stops
            taken.append((lanes, places, actions, log_probs.gather(1, actions[:, None]).squeeze(1), ~alive))
            places, stops, lanes = ends_at[alive], stops[alive], lanes[alive]
        order, places, actions, kept, ends = (torch.cat(parts) for parts in zip(*taken, strict=True))
        order = order.sort(stable=True).indices  # text after text; within a text the order is kept
        all_outcomes = held.at(places[order])
        return Decisions(
            self.table.features[places[order]],
            actions[order],
            kept[order],
            all_outcomes.of(actions[order]),
            ends[order],
            all_outcomes,
            float(self.oracle.best_seconds[texts].sum()),
        )

    def _check(self, policy: ReSpSPolicy) -> None:
        given = (self.table.features.shape[1], self.table.action_count)
        needed = (policy.config.feature_size, len(policy.config.grid))
        if given != needed:
            raise ValueError(
                f"The replayed texts have features of width {given[0]} and {given[1]} actions, but the policy reads "
                f"width {needed[0]} and has {needed[1]} actions. Record the texts with the policy's own head, and "
                "make their outcomes for `policy.config.grid`."
            )
        policy.check_identity(grid=self.table.grid)


def _draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One action per row of `[n, a]`."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)


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
