"""What a second is worth, and when a head that does not pay is asked again."""

import pytest

from transformers_resps.policies.throughput import ThroughputMemory
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import TreeShape


def step(emitted: int, seconds: float) -> StepRecord:
    return StepRecord(TreeShape.plain(), 0, 1, RowCounts([emitted - 1]), RowCounts([emitted]), 0.0, seconds, seconds)


def test_the_rate_is_that_of_the_text_so_far_between_one_and_two_plain_rates() -> None:
    memory = ThroughputMemory()
    for _ in range(10):
        memory.add(step(3, 2.0))
    assert memory.rate(plain_seconds=1.0) == pytest.approx(1.5)
    assert memory.rate(plain_seconds=0.5) == 2.0, "at least a plain step's"
    assert memory.rate(plain_seconds=2.0) == 1.0, "at most twice as much"


def test_a_head_that_does_not_pay_is_probed_ever_more_rarely() -> None:
    memory, asked = ThroughputMemory(), []
    for number in range(400):
        if memory.asks_head(0.0, has_lookup=False):
            asked.append(number)
            memory.note_gain(-1.0)
    waits = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert waits == sorted(waits) and waits[-4:] == [32, 64, 128, 128]


def test_no_probe_is_made_while_looked_up_nodes_are_verified() -> None:
    memory = ThroughputMemory()
    for _ in range(30):
        memory.note_gain(-1.0)
    assert not any(memory.asks_head(0.5, has_lookup=True) for _ in range(300))


def test_a_head_that_was_right_is_asked_though_it_does_not_pay_after_steps_it_was_wrong_in() -> None:
    memory = ThroughputMemory()
    memory.head_was_right = False
    for _ in range(30):
        memory.note_gain(-1.0)
    assert not all(memory.asks_head(0.0, has_lookup=False) for _ in range(5))
    memory.head_was_right = True
    assert all(memory.asks_head(0.0, has_lookup=False) for _ in range(5))
