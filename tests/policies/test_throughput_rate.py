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


def without_gain(*, head_was_right: bool = True) -> ThroughputMemory:
    memory = ThroughputMemory()
    memory.head_was_right = head_was_right
    for _ in range(30):
        memory.note_draft(0.0, 0.1, 0.0)
    return memory


@pytest.mark.parametrize("lookup_hit", [0.0, 0.3])
def test_a_head_that_does_not_pay_is_probed_ever_more_rarely(lookup_hit: float) -> None:
    """Beside a lookup that is rarely right, too: a batch of texts has one at nearly every step."""
    memory, asked = without_gain(), []
    for number in range(400):
        if memory.asks_head(lookup_hit):
            asked.append(number)
            memory.note_draft(0.0, 0.1, lookup_hit)
    waits = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert waits == sorted(waits) and waits[-4:] == [32, 64, 128, 128]


def test_no_probe_is_made_beside_a_likely_lookup() -> None:
    memory = without_gain()
    assert not any(memory.asks_head(0.5) for _ in range(300))


def test_a_head_that_pays_alone_is_asked_as_far_as_the_lookup_leaves_enough() -> None:
    memory = ThroughputMemory()
    for _ in range(30):
        memory.note_draft(0.4 * (1 - 0.2), 0.2, 0.2)  # 0.4 without the lookup
    assert all(memory.asks_head(hit) is (hit < 0.5) for hit in (0.0, 0.4, 0.45, 0.55, 0.9))
    for _ in range(300):
        memory.asks_head(0.9)
    assert memory.asks_head(0.0), "once the lookup fails"


def test_a_head_that_was_right_is_asked_though_it_does_not_pay_after_steps_it_was_wrong_in() -> None:
    memory = without_gain(head_was_right=False)
    assert not all(memory.asks_head(0.0) for _ in range(5))
    memory.head_was_right = True
    assert all(memory.asks_head(0.0) for _ in range(5))


def test_a_first_draft_that_was_interrupted_does_not_end_asking() -> None:
    """It took fifteen times as long as those that follow."""
    memory = ThroughputMemory()
    for price in (3.0, 0.2, 0.2, 0.2):
        assert memory.asks_head(0.0)
        memory.note_draft(0.9, price, 0.0)
