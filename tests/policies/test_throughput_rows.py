"""What the default policy makes of a batch, whose rows have outcomes of their own."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.decoding.rows import prompts, speculate
from tests.policies.rows import observation, record
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, attach
from transformers_resps.policies.base import Observation, count_nodes
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.tree import Pricing, TreeShape


ONE = torch.ones(1, dtype=torch.long)  # the level of a pool's only node


def test_every_row_of_a_ragged_batch_tells_how_much_the_head_drafted() -> None:
    """A head that proposes all tokens but one: a row finds nothing drafted where it writes that one."""
    target = attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))
    drafter = DraftHead.from_target(target, draft_token_ids=torch.arange(1, VOCABULARY))
    policy = FixedPolicy(TreeShape(VOCABULARY, 1, VOCABULARY))
    policy.needs_drafted_match = True
    report = speculate(target, prompts(1), assistant_model=drafter, policy=policy, eos_token_id=[2, 6]).speculation
    written = [1] * 4  # the prefill's
    for step in report.steps[1:]:
        firsts = [
            answer[place] if place < len(answer) else 0 for answer, place in zip(report.answers, written, strict=True)
        ]
        assert step.drafted_match == tuple(
            int(first != 0 and count > 0) for first, count in zip(firsts, step.emitted, strict=True)
        )
        written = [place + count for place, count in zip(written, step.emitted, strict=True)]
    assert any(0 in step.emitted for step in report.steps), "no row ended early"


def prob_after(outcome: Callable[[int], StepRecord]) -> float:
    """What a policy thinks of a node that the head gives one half, after forty drafts of such nodes for eight rows."""
    policy, half = ThroughputPolicy(), [math.log(0.5)]
    policy.observe(record(1, (1,) * 8, 1.0))
    for step in range(40):
        policy.choose(observation(8, step))
        policy.size(torch.tensor([half] * 8), ONE)
        policy.observe(outcome(step))
    return policy.acceptance.probabilities(half, 1)[0]


def test_probabilities_follow_the_mean_row_where_rows_advance_apart() -> None:
    """Each of eight rows is right half the time, as the head says. That all of them are is another matter."""

    def half_of_them(step: int) -> StepRecord:
        right = tuple((row + step) % 2 for row in range(8))
        return record(2, tuple(1 + one for one in right), 1.2, drafted_match=RowCounts(right))

    assert prob_after(half_of_them) == pytest.approx(0.5, rel=0.1)


def test_rows_in_lockstep_have_one_outcome() -> None:
    assert prob_after(lambda step: record(2, (1,) * 8, 1.2, drafted_match=RowCounts([0]))) < 0.25


def test_the_more_rows_the_fewer_children() -> None:
    policy = ThroughputPolicy(top_k=4)
    policy.observe(record(1, (1,), 1.0))
    assert [policy.choose(observation(rows)).top_k for rows in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 1]


def test_prices_are_read_anew_as_soon_as_a_tree_of_another_size_was_timed() -> None:
    """Guessed, eight nodes are cheap; the first tree of four shows what they are."""
    policy = ThroughputPolicy()
    policy.observe(record(1, (1,), 1.0))
    policy.choose(observation(1))
    scores = torch.log(torch.tensor([[0.9, 0.3, 0.3, 0.3]]))
    (cheap,) = count_nodes(policy, scores, ONE.expand(4))
    policy.costs.add(2, 0, 1.3, 0.0, 1.3)
    policy.costs.add(4, 0, 2.5, 0.0, 2.5)
    policy.choose(observation(1))
    assert count_nodes(policy, scores, ONE.expand(4))[0] < cheap


def test_what_a_node_is_worth_counts_most_in_the_row_that_lags_behind() -> None:
    """Of eight rows one is sure of its node. Where it is the last one the node pays, where it is ahead it does not."""

    def nodes(row_weights: list[float]) -> int:
        policy = ThroughputPolicy()
        policy.observe(record(1, (1,) * 8, 1.0))
        policy.costs.add(2, 1, 1.2, 0.05, 1.25)
        policy.choose(replace(observation(8), row_weights=row_weights))
        return count_nodes(policy, torch.log(torch.tensor([[0.9]] + [[0.05]] * 7)), ONE)[0]

    assert nodes([4.5] + [0.5] * 7) == 2
    assert nodes([1.0] * 8) == nodes([0.1] + [7.9 / 7] * 7) == nodes([]) == 1


def ragged(rows: int, chains: list[list[float]] | None = None) -> Observation:
    """Of rows whose trees may differ in size."""
    found = chains or [[]] * rows
    return replace(
        observation(rows), pricing=Pricing(packs_rows=True), row_accept_probs=lambda: found, row_weights=[1.0] * rows
    )


def timed(rows: int, seconds: dict[int, float]) -> ThroughputPolicy:
    """A policy that knows what forwards over so many nodes beside the roots cost."""
    policy = ThroughputPolicy()
    policy.observe(record(1, (1,) * rows, seconds[0]))
    for nodes, verify in seconds.items():
        policy.costs.add(1 + nodes, 1, verify, 0.05, verify + 0.05)
    return policy


def test_nodes_go_to_the_rows_that_are_sure_of_them() -> None:
    """Each costs a fifth of what a token is worth in one of four rows; shared alike they would pay for none."""
    policy = timed(4, {0: 1.0, 8: 1.0 + 8 * 0.2 * 0.25 * 2.5})
    policy.choose(ragged(4))
    scores = torch.log(torch.tensor([[0.9, 0.8], [0.2, 0.1], [0.9, 0.1], [0.1, 0.1]]))
    assert policy.size(scores, torch.tensor([1, 2])) == [3, 1, 2, 1]


def test_rows_look_up_what_pays_in_each() -> None:
    policy = timed(4, {0: 1.0, 8: 2.0})
    shape = policy.choose(replace(ragged(4, [[0.9, 0.8, 0.7], [], [0.2, 0.1], [0.95, 0.1]]), can_draft=False))
    assert shape == TreeShape(1, 0, 1, lookup=3)
    assert 0.2 < policy.least_lookup_prob <= 0.7


def test_a_head_that_had_failed_is_asked_again_though_some_row_always_looks_up() -> None:
    policy, asked = timed(4, {0: 1.0, 4: 1.1}), []
    for step in range(100):
        shape = policy.choose(ragged(4, [[0.3], [], [], []]))
        assert shape.lookup == 1
        asked.append(shape.asks_head)
        done = replace(record(2, (2, 1, 1, 1), 1.02), shape=shape)
        if shape.asks_head:
            is_right = step >= 40
            policy.size(torch.log(torch.tensor([[0.9 if is_right else 0.01]] * 4)), ONE)
            found = RowCounts([int(is_right)] * 4)
            done = replace(done, draft_seconds=0.1, step_seconds=1.12, drafted_match=found)
        policy.observe(done)
    assert not all(asked[:40]) and all(asked[80:])


@pytest.mark.parametrize(("chances", "beside", "nodes"), [([0.5], 0.3, 0), ([0.5], 0.0, 1), ([0.9, 0.8], 0.3, 2)])
def test_what_gains_less_than_looking_it_up_takes_is_not_looked_up(
    chances: list[float], beside: float, nodes: int
) -> None:
    """A step of a second writes a token. Nodes cost a tenth, and what looks them up takes time of its own."""
    policy = timed(1, {0: 1.0, 8: 1.8})
    looking = record(3, (3,), 1.2)
    shape = TreeShape(1, 0, 1, lookup=2)
    policy.observe(replace(looking, shape=shape, step_seconds=looking.verify_seconds + beside))
    given = replace(observation(1), can_draft=False, prefix_accept_probs=lambda: chances)
    assert policy.choose(given).lookup == nodes


def test_a_forward_over_rows_of_different_sizes_is_priced_by_all_its_nodes() -> None:
    policy = timed(4, {0: 1.0})
    policy.choose(ragged(4))
    policy.observe(record(3, (3, 1, 2, 1), 1.5, sizes=RowCounts((3, 1, 2, 1))))
    assert policy.costs.verify_seconds(4) == pytest.approx(1.5, rel=0.01)
