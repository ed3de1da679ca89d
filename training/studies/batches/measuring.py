"""Decode groups of prompts in several ways, in turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transformers_resps.generation.sequences import end_ids, left_padded, up_to_end
from transformers_resps.head import DraftHead
from transformers_resps.policy import Policy


# Way -> what it adds to the call with a head; `None` decodes plainly. The last two give every row a call of its own.
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "rows apart": {"lockstep": None},
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
    """

    way: str
    batch_size: int
    group: int
    repeat: int
    tokens: int
    seconds: float
    same: int


class BatchBench:
    """One target and head that decode greedily, up to `max_new_tokens` a row, timed by `clock`.

    Args:
        target: attached.
        head: drafts.
        make_policy: a policy for each way and batch size, which learns on from group to group.
        max_new_tokens: of a row.
        clock: seconds.
    """

    def __init__(
        self,
        target: Any,
        head: DraftHead,
        make_policy: Callable[[], Policy],
        max_new_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._head, self._make_policy, self._clock = target, head, make_policy, clock
        self._max_new_tokens = max_new_tokens
        self._policies: dict[tuple[str, int], Policy] = {}
        self._ends = end_ids(target)

    def run(self, prompts: Sequence[Tensor], sizes: Sequence[int], repeats: int) -> Iterator[GroupTiming]:
        """Warm up, then every way on every group of each size, beginning with another way each time."""
        self._decode("rows apart", prompts[: max(sizes)])
        for repeat in range(repeats):
            for size in sizes:
                groups = [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]
                for number, group in enumerate(groups):
                    yield from self._measure(group, number, repeat)

    def _measure(self, group: Sequence[Tensor], number: int, repeat: int) -> Iterator[GroupTiming]:
        ways = [way for way in WAYS if len(group) > 1 or way not in ("lockstep", *_ONE_BY_ONE)]
        first = (number + repeat) % len(ways)
        taken = {way: self._decode(way, group) for way in [*ways[first:], *ways[:first]]}
        plain, _ = taken["plain"]
        for way, (answers, seconds) in taken.items():
            same = sum(own == other for own, other in zip(answers, plain, strict=True))
            yield GroupTiming(way, len(group), number, repeat, sum(map(len, answers)), seconds, same)

    def _decode(self, way: str, group: Sequence[Tensor]) -> tuple[list[list[int]], float]:
        """The answers of a group, each up to its end token, and the seconds they took."""
        batches = [[prompt] for prompt in group] if way in _ONE_BY_ONE else [group]
        answers = []
        started = self._clock()
        for batch in batches:
            answers += self._generate(way, batch)
        return answers, self._clock() - started

    def _policy(self, way: str, batch_size: int) -> Policy:
        if (way, batch_size) not in self._policies:
            self._policies[way, batch_size] = self._make_policy()
        return self._policies[way, batch_size]

    def _generate(self, way: str, batch: Sequence[Tensor]) -> list[list[int]]:
        ids, mask = left_padded(batch)
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
        if (extra := WAYS[way]) is not None:
            options |= {"assistant_model": self._head, "policy": self._policy(way, len(batch)), **extra}
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
            )
    return rows


def _rate(measurements: Sequence[GroupTiming]) -> float:
    return sum(m.tokens for m in measurements) / sum(m.seconds for m in measurements)
