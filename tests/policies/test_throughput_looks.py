"""Looking for repetitions takes time, too: where they are rare it is done rarely."""

import pytest

from transformers_resps.policies.base import Observation, Trials
from transformers_resps.policies.costs import RunningCosts
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


PLAIN_SECONDS = 0.008


class Text:
    """Plain steps of a text that is decoded without a head; asking what it repeats takes `look_seconds`."""

    def __init__(self, look_seconds: float) -> None:
        self.policy, self.look_seconds = ThroughputPolicy(), look_seconds
        self.probs: list[float] = []  # of what is found
        self.looks: list[bool] = []  # of each step, whether it asked

    def step(self) -> TreeShape:
        looks = len(self.looks)
        shape = self.policy.choose(Observation(None, 100 + looks, looks, 200, self._look, can_draft=False))
        has_looked = len(self.looks) > looks
        self.looks = [*self.looks[:looks], has_looked]
        found, draft = shape.lookup, self.look_seconds * has_looked
        emitted, seconds = RowCounts([1 + found]), PLAIN_SECONDS * (1 + 0.02 * found)
        record = StepRecord(
            shape, found, 1 + found, RowCounts([found]), emitted, draft, seconds, seconds + draft, RowCounts([0])
        )
        self.policy.observe(record)
        return shape

    def _look(self) -> list[float]:
        self.looks.append(True)
        return self.probs


def test_a_text_without_repetitions_is_looked_up_ever_more_rarely() -> None:
    text = Text(look_seconds=0.0004)
    for _ in range(400):
        text.step()
    assert all(text.looks[1:50])
    assert sum(text.looks[-80:]) == 10


def test_repetitions_that_begin_late_are_found_and_then_looked_up_at_every_step() -> None:
    text = Text(look_seconds=0.0004)
    for _ in range(400):
        text.step()
    text.probs = [0.9, 0.81, 0.7, 0.6]
    lookups = [text.step().lookup for _ in range(40)]
    assert any(lookups[:8]) and all(lookups[-20:])


def test_looks_that_cost_nothing_are_never_left_out() -> None:
    text = Text(look_seconds=0.0)
    for _ in range(400):
        text.step()
    assert all(text.looks[1:])


def test_an_interrupted_look_counts_little() -> None:
    costs = RunningCosts()
    for number in range(30):
        costs.add(1, 0, PLAIN_SECONDS, 0.2 if number == 20 else 0.0004, 0.3, has_looked=True)
    assert costs.look_seconds == costs.copy().look_seconds == pytest.approx(0.0004, rel=0.1)


def test_what_does_not_pay_is_tried_ever_more_rarely_until_it_does() -> None:
    trials = Trials(2, 8)
    assert [number for number in range(40) if trials.is_due(pays=False)] == [1, 5, 13, 21, 29, 37]
    assert trials.is_due(pays=True)
    assert [trials.is_due(pays=False) for _ in range(2)] == [False, True]
