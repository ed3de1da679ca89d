"""Measure what draft trees gain in batches: ragged, in lockstep, and each row alone.

Question: what do draft trees gain in a batch, with ragged rows and in lockstep?
Answer: less the larger the batch. With a chain of three drafted tokens ragged rows reach 1.86x plain decoding at batch
size 1, 1.29x at 4 and 1.13x at 8; in lockstep 0.82x and 0.67x (SmolLM2, GSM8K).

    python -m training.studies.batches TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --pack --shape 4,3,1
    python -m training.studies.batches TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --compile --temperature 1

Method: greedy or sampled, every way in turn on the same groups of prompts: plain, ragged, in lockstep, and every
row alone. Run it on a quiet machine. Without `--shape` every way and batch size has its own `policy="auto"`, which
learns from group to group, as in a user's process. With `--compile` all ways run compiled, and stock plain decoding
stands beside them; run it twice, since what is compiled is kept for the second process. A step's nodes are those of
its forward, and its phases are milliseconds.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_resps.generation.output import end_ids, left_padded, up_to_end
from transformers_resps.heads import DraftHead
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Policy, PolicyWrapper
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.telemetry import StepRecord
from transformers_resps.tree import TreeShape

from .experiment import Experiment, add_options, execute


# Way -> what it adds to the call with a head; `None` decodes plainly. The last two give every row a call of its own.
WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "plain": None,
    "ragged": {"lockstep": False},
    "lockstep": {"lockstep": True},
    "plain, one by one": None,
    "tree, one by one": {},
}
_ONE_BY_ONE = ("plain, one by one", "tree, one by one")


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """One group of prompts decoded once.

    Attributes:
        way: one of `WAYS`.
        batch_size: prompts of the group.
        group: which one.
        repeat: from 0.
        tokens: of all answers, each up to its end token.
        seconds: of all calls.
        same: answers that equal those of the plain batch.
        steps: of drafted calls, all but the prefill; empty for the others.
    """

    way: str
    batch_size: int
    group: int
    repeat: int
    tokens: int
    seconds: float
    same: int
    steps: list[StepRecord] = field(default_factory=list)


class _Noted(PolicyWrapper):
    """Decides as the wrapped policy, and keeps the steps of a call."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.steps: list[StepRecord] = []

    def observe(self, record: StepRecord) -> None:
        self.steps.append(record)
        super().observe(record)


class BatchBench:
    """One target and head that decode up to `max_new_tokens` a row, timed by `clock`.

    Args:
        target: attached.
        head: drafts.
        make_policy: a policy for each way and batch size, which learns on from group to group.
        max_new_tokens: of a row.
        clock: seconds.
        temperature: of what is drawn; 0 decodes greedily.
        compiles: whether steps run compiled; the way "stock" is then measured as well.
    """

    def __init__(
        self,
        target: Any,
        head: DraftHead,
        make_policy: Callable[[], Policy],
        max_new_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        *,
        temperature: float = 0.0,
        compiles: bool = False,
    ) -> None:
        self._target, self._head, self._make_policy, self._clock = target, head, make_policy, clock
        self._temperature, self._compiles = temperature, compiles
        self._max_new_tokens = max_new_tokens
        self._policies: dict[tuple[str, int], Policy] = {}
        self._ends = end_ids(target)

    def run(self, prompts: Sequence[Tensor], sizes: Sequence[int], repeats: int) -> Iterator[GroupTiming]:
        """Warm up, then every way on every group of each size, beginning with another way each time."""
        for size in {1, max(sizes)} if self._compiles else {max(sizes)}:
            for way in ("plain", "ragged"):
                self._decode(way, prompts[:size])
        for repeat in range(repeats):
            for size in sizes:
                groups = [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]
                for number, group in enumerate(groups):
                    yield from self._measure(group, number, repeat)

    def _measure(self, group: Sequence[Tensor], number: int, repeat: int) -> Iterator[GroupTiming]:
        left_out = [] if self._compiles else ["stock"]
        left_out += [] if len(group) > 1 else ["lockstep", *_ONE_BY_ONE]
        ways = [way for way in WAYS if way not in left_out]
        first = (number + repeat) % len(ways)
        taken = {way: self._decode(way, group) for way in [*ways[first:], *ways[:first]]}
        plain, *_ = taken["plain"]
        for way, (answers, seconds, steps) in taken.items():
            same = sum(own == other for own, other in zip(answers, plain, strict=True))
            yield GroupTiming(way, len(group), number, repeat, sum(map(len, answers)), seconds, same, steps)

    def _decode(self, way: str, group: Sequence[Tensor]) -> tuple[list[list[int]], float, list[StepRecord]]:
        """The answers of a group, each up to its end token, the seconds they took, and their steps."""
        batches = [[prompt] for prompt in group] if way in _ONE_BY_ONE else [group]
        answers, policy = [], _Noted(self._policy(way, len(batches[0])))
        torch.manual_seed(0)
        started = self._clock()
        for batch in batches:
            answers += self._generate(way, batch, policy)
        return answers, self._clock() - started, policy.steps

    def _policy(self, way: str, batch_size: int) -> Policy:
        if (way, batch_size) not in self._policies:
            self._policies[way, batch_size] = self._make_policy()
        return self._policies[way, batch_size]

    def _generate(self, way: str, batch: Sequence[Tensor], policy: Policy) -> list[list[int]]:
        ids, mask = left_padded(batch)
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": self._temperature > 0}
        if self._temperature:
            options |= {"temperature": self._temperature, "top_k": 0}
        if (extra := WAYS[way]) is not None:
            options |= {"assistant_model": self._head, "policy": policy, **extra}
        elif self._compiles and way != "stock":
            options["policy"] = FixedPolicy(TreeShape.plain())
        if self._compiles and way != "stock":
            options["compile"] = True
        device = self._target.device
        sequences = self._target.generate(ids.to(device), attention_mask=mask.to(device), **options)
        return [up_to_end(row, self._ends) for row in sequences[:, ids.shape[1] :].tolist()]


def table(measurements: Sequence[GroupTiming]) -> list[dict[str, Any]]:
    """One row per batch size and way: tokens per second, and the ratios to the plain batch and to trees one by one."""
    rows = []
    for size in sorted({m.batch_size for m in measurements}):
        own = [m for m in measurements if m.batch_size == size]
        rates = {way: _rate(found) for way in WAYS if (found := [m for m in own if m.way == way])}
        for way, rate in rates.items():
            found = [m for m in own if m.way == way]
            alone = rates.get("tree, one by one")
            rows.append(
                {
                    "batch_size": size,
                    "way": way,
                    "tokens_per_second": rate,
                    "to_plain_batch": rate / rates["plain"],
                    "to_one_by_one": rate / alone if alone else None,
                    "same_text": sum(m.same for m in found) / sum(m.batch_size for m in found),
                }
                | _of_steps([step for m in found for step in m.steps])
            )
    return rows


def _of_steps(steps: Sequence[StepRecord]) -> dict[str, float | None]:
    """Means: tokens of a decoded row, nodes of a forward, and milliseconds of each phase."""
    totals = {
        "tau": (sum(step.emitted_total for step in steps), sum(step.decoded_rows for step in steps)),
        "nodes": (sum(sum(step.sizes) or step.verified * step.decoded_rows for step in steps), len(steps)),
        "draft_ms": (1e3 * sum(step.draft_seconds for step in steps), len(steps)),
        "verify_ms": (1e3 * sum(step.verify_seconds for step in steps), len(steps)),
        "rest_ms": (1e3 * sum(step.rest_seconds for step in steps), len(steps)),
    }
    return {name: total / count if count else None for name, (total, count) in totals.items()}


def _rate(measurements: Sequence[GroupTiming]) -> float:
    return sum(m.tokens for m in measurements) / sum(m.seconds for m in measurements)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m training.studies.batches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "results/batches")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, decodes greedily")
    parser.add_argument("--compile", action="store_true", help="compile every way, and measure stock decoding beside")
    return execute(parser, arguments, run)


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    given = Experiment.load(args)
    bench = BatchBench(
        given.target,
        given.head,
        lambda: policy_of(args.shape),
        args.max_new_tokens,
        temperature=args.temperature,
        compiles=args.compile,
    )
    sizes = [size for size in args.batch_sizes if size <= len(given.prompts)]
    if not sizes:
        raise ValueError(
            f"The batch sizes {args.batch_sizes} are above the number of prompts, {len(given.prompts)}. Pass smaller "
            "`--batch-sizes`, or a larger `--limit` and a dataset of as many rows."
        )
    runs = list(tqdm(bench.run(given.prompts, sizes, args.repeats), desc="Decoding"))
    given.report(args, table(runs), runs)
    return 0


def policy_of(chosen: TreeShape | None) -> Policy:
    """One shape for every step, or a fresh default policy."""
    return default_policy() if chosen is None else FixedPolicy(chosen)


if __name__ == "__main__":
    sys.exit(main())
