"""The report of a call of `generate` with a record of each step, and functions that compute tokens per second."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..tree import DRAFTED, LOOKED_UP, REMEMBERED, Pricing, TreeShape
from .display import decoder, detokenize_incrementally


class RowCounts(tuple[int, ...]):
    """A tuple with one number per row of the batch; `int(counts)` works if there is only one row."""

    __slots__ = ()

    def __int__(self) -> int:
        if len(self) != 1:
            raise ValueError(f"{tuple(self)} counts {len(self)} rows. Take one of them by its index, or their sum.")
        return self[0]

    def to_json(self) -> int | list[int]:
        """Return an integer for one row, otherwise a list."""
        return self[0] if len(self) == 1 else list(self)


class Timed(Protocol):
    """The type of any object with the properties `tokens` and `seconds`."""

    @property
    def tokens(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Timing(NamedTuple):
    """The number of tokens of one text, and the seconds in which they were decoded."""

    tokens: int
    seconds: float


def rate(timed: Iterable[Timed]) -> float:
    """Return tokens per second: the sum of all tokens divided by the sum of all seconds."""
    kept = list(timed)
    return sum(one.tokens for one in kept) / sum(one.seconds for one in kept)


def bootstrap_interval(
    own: Sequence[Sequence[Timing]], base: Sequence[Sequence[Timing]], *, draws: int = 2000
) -> tuple[float, float]:
    """Return the 95% bootstrap interval of rate(own) / rate(base).

    `own[i][j]` and `base[i][j]` are the totals of the same request `j` in process `i`. Processes and requests are
    drawn with replacement; each draw is used for both rates. The same totals always give the same interval.
    """
    drawn = np.random.default_rng(0)
    of_processes, of_requests = (
        drawn.multinomial(count, np.full(count, 1 / count), draws) for count in (len(own), len(own[0]))
    )
    (tokens, seconds), (base_tokens, base_seconds) = (
        np.einsum("dp,prn,dr->nd", of_processes, np.array(totals, np.float64), of_requests) for totals in (own, base)
    )
    low, high = np.percentile(tokens / seconds / (base_tokens / base_seconds), [2.5, 97.5])
    return float(low), float(high)


class Proposed(NamedTuple):
    """Numbers of accepted nodes, of all rows together, by the source that proposed them."""

    drafter: int = 0  # only by the head or another drafter
    lookup: int = 0  # only by lookup in the text of the call
    both: int = 0  # by several sources
    memory: int = 0  # only by lookup in a memory of other texts

    @classmethod
    def of(cls, flags: Sequence[int]) -> "Proposed":
        """Count nodes by source; `flags` has each node's value in `DraftTree.proposers`."""
        drafter, lookup, memory = map(flags.count, (DRAFTED, LOOKED_UP, REMEMBERED))
        return cls(drafter, lookup, len(flags) - drafter - lookup - memory, memory)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decoding step: a target forward and the work before and after it.

    Attributes:
        shape: the shape that the policy chose, reduced if fewer tokens could still be generated.
        drafted: number of nodes that head and lookup proposed.
        verified: number of nodes in the target forward, root included; the maximum over rows.
        accepted: number of drafted tokens that each row accepted; with one row `int(accepted)` works.
        emitted: number of tokens that each row gained: the accepted ones plus the bonus token; 0 for finished rows.
        draft_seconds: time of policy and draft; for the prefill, the pass of head and lookup over the prompt.
        verify_seconds: time of the target forward; on a GPU it includes drafting work that is still running.
        step_seconds: time of the whole step, policy and bookkeeping included.
        drafted_match: number of the step's first tokens that form a path in the head's whole draft, verified or not.
            Ragged batches have one number per row, 0 for finished rows; lockstep has one number, the minimum over
            rows that gained tokens. It is a single 0 if the policy does not use it.
        proposed: numbers of accepted tokens of all rows, by source.
        sizes: number of nodes of each decoded row if the forward computed no padding; else empty.
        pricing: facts, apart from the number of nodes, that determine what the forward costs.
    """

    shape: TreeShape
    drafted: int
    verified: int
    accepted: RowCounts
    emitted: RowCounts
    draft_seconds: float
    verify_seconds: float
    step_seconds: float
    drafted_match: RowCounts = RowCounts((0,))
    proposed: Proposed = Proposed()
    sizes: RowCounts = RowCounts(())
    pricing: Pricing = Pricing()

    @property
    def computed(self) -> int:
        """Number of nodes that determines the forward's cost, at least `pricing.least_nodes`.

        Normally it is the node count of the largest row. Without padding it is 1 plus all rows' nodes except roots.
        """
        nodes = 1 + sum(self.sizes) - len(self.sizes) if self.sizes else self.verified
        return max(nodes, self.pricing.least_nodes)

    @property
    def rows_of_a_node(self) -> int:
        """Number of rows that get one more node if `computed` rises by 1: all decoded rows, or 1 without padding."""
        return 1 if self.sizes else self.decoded_rows

    @property
    def accepted_total(self) -> int:
        return sum(self.accepted)

    @property
    def emitted_total(self) -> int:
        return sum(self.emitted)

    @property
    def rest_seconds(self) -> float:
        """Seconds of the step outside drafting and verifying: acceptance, caches, logits processors, streamers."""
        return max(self.step_seconds - self.draft_seconds - self.verify_seconds, 0.0)

    @property
    def decoded_rows(self) -> int:
        """Number of rows that had not finished before this step."""
        return sum(count > 0 for count in self.emitted)

    @property
    def mean_emitted(self) -> float:
        """Mean number of new tokens of the rows that had not finished before this step."""
        return self.emitted_total / max(self.decoded_rows, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values; counts of a single row are integers."""
        names = ("accepted", "emitted", "drafted_match", "sizes")
        counts = {name: getattr(self, name).to_json() for name in names}
        return asdict(self) | counts | {"proposed": self.proposed._asdict()}


@dataclass(slots=True)
class SpeculationReport:
    """The steps of one call of `generate`, with their tokens and seconds.

    Attributes:
        steps: one record per step; the first is the prefill, a plain step over the whole prompt.
        answers: the new token ids of each row, padded after a row's end.
        compile_seconds: seconds of compiling forwards and capturing CUDA graphs; no step includes them.
        reason: the policy's explanation why most steps were plain; `None` if the policy gives none.
        why_eager: why steps did not run compiled; `None` if they did.
    """

    batch_size: int = 1
    steps: list[StepRecord] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    compile_seconds: float = 0.0
    reason: str | None = None
    why_eager: str | None = None

    @property
    def emitted_total(self) -> int:
        return sum(step.emitted_total for step in self.steps)

    @property
    def target_forwards(self) -> int:
        return len(self.steps)

    @property
    def tau(self) -> float:
        """Mean acceptance length: new tokens per target forward and unfinished row, prefill included."""
        forwards = sum(step.decoded_rows for step in self.steps)
        return self.emitted_total / forwards if forwards else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """The same as `tau`, under vLLM's name."""
        return self.tau

    @property
    def accepted_by_source(self) -> Proposed:
        return Proposed(*map(sum, zip(*(step.proposed for step in self.steps), strict=True)))

    @property
    def seconds(self) -> float:
        return sum(step.step_seconds for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second, prefill included; 0 if no time was measured."""
        return self.emitted_total / self.seconds if self.seconds > 0 else 0.0

    def acceptance(self) -> dict[str, Any]:
        """Return two fields of our own, then those of vLLM 0.32's `metrics.speculative_decoding`, which AIPerf reads.

        Only our two fields count the prefill. All verified nodes except the root count as draft tokens.
        """
        steps = self.steps[1:]
        accepted = [step.accepted_total for step in steps]
        drafted = sum(step.verified - 1 for step in steps)
        return {
            "num_target_forwards": self.target_forwards,
            "mean_tokens_per_forward": self.tau,
            "num_spec_steps": len(steps),
            "num_draft_tokens": drafted,
            "num_accepted_draft_tokens": sum(accepted),
            "mean_acceptance_length": 1 + sum(accepted) / max(len(steps), 1),
            "draft_acceptance_rate": sum(accepted) / max(drafted, 1),
            "acceptance_histogram": [accepted.count(count) for count in range(max(accepted, default=0) + 1)],
        }

    def to_dict(self) -> dict[str, Any]:
        totals = ("emitted_total", "target_forwards", "tau", "seconds", "tokens_per_second", "compile_seconds")
        summary = {name: getattr(self, name) for name in ("batch_size", *totals, "reason", "why_eager")}
        sources = self.accepted_by_source._asdict()
        return summary | {"accepted_by_source": sources, "steps": [step.to_dict() for step in self.steps]}

    def show(self, tokenizer: Any = None, *, row: int = 0, console: Any = None) -> None:
        """Print the output of `row` with accepted tokens in colour, then a table of the steps.

        Without a `tokenizer` token ids are printed. `console` is a `rich.console.Console`; by default the terminal.
        Raises an `ImportError` without the package `rich`, a `ValueError` if the batch has no such `row`.
        """
        try:
            from .console import print_steps
        except ModuleNotFoundError as error:
            raise ImportError(
                "`show` needs the package `rich`. Run `pip install 'transformers-resps[inspect]'`, or read `steps` "
                "and `answers`."
            ) from error
        print_steps(self, self._texts(tokenizer, row), console)

    def _texts(self, tokenizer: Any, row: int) -> list[list[str]]:
        """Return, for each step, the new tokens of `row` as strings."""
        if not -len(self.answers) <= row < len(self.answers):
            raise ValueError(f"Got row={row}, but the batch has {len(self.answers)} rows, counted from 0.")
        answer = self.answers[row]
        written = [f"{token} " for token in answer]
        if tokenizer is not None:
            written = detokenize_incrementally(answer, decoder(tokenizer))
        ends = list(accumulate((step.emitted[row] for step in self.steps), initial=0))
        return [written[start:end] for start, end in pairwise(ends)]

    def __str__(self) -> str:
        parts = {
            "drafting": sum(step.draft_seconds for step in self.steps),
            "verifying": sum(step.verify_seconds for step in self.steps),
            "the rest": sum(step.rest_seconds for step in self.steps),
        }
        shares = ", ".join(f"{name} {seconds / self.seconds:.0%}" for name, seconds in parts.items() if self.seconds)
        trees = sum(step.verified > 1 for step in self.steps)
        return (
            f"{self.emitted_total} tokens in {self.target_forwards} forwards of the target, {trees} of them over "
            f"trees: tau {self.tau:.2f}, {self.tokens_per_second:.1f} tokens/s. Time: {shares or 'none'}. "
            + ("Compiled." if self.why_eager is None else f"Not compiled: {self.why_eager}.")
            + (f" {self.reason}" if self.reason else "")
        )
