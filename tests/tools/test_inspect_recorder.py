"""What a recorder keeps, on real steps of tiny models."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import BaselineGuard, DraftHead, FixedPolicy, Policy, ThroughputPolicy, TreeShape, attach
from transformers_resps.tools.inspect import Examination, RecordedStep, StepRecorder, examine

from .examples import merged_step


SHAPE = TreeShape(6, 3, 2, 4)


def found_at(step: RecordedStep, source: str) -> list[int]:
    """The nodes that a source proposed."""
    return [node for node, own in enumerate(step.sources) if own == source]


def examined(target: PreTrainedModel, head: DraftHead | None, policy: Policy, prompt: dict[str, Any]) -> Examination:
    return examine(attach(target), head, policy, prompt["input_ids"][0], settings={"max_new_tokens": 40})


@pytest.fixture
def found(tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]) -> Examination:
    return examined(tiny_target, tiny_head, FixedPolicy(SHAPE), prompt)


def test_every_step_but_the_prefill_is_kept(found: Examination) -> None:
    assert [step.record for step in found.steps] == found.report.steps[1:]
    assert [step.step for step in found.steps] == list(range(len(found.steps)))
    assert found.parts_at is None


def test_the_accepted_path_of_every_tree_is_the_text(found: Examination) -> None:
    answer = found.report.answers[0]
    start = 1
    for step in found.steps:
        tokens = step.tree.tokens[0].tolist()
        assert tokens[0] == answer[start - 1]
        assert [tokens[node] for node in step.path[1:]] == answer[start : start + step.record.emitted[0] - 1]
        assert step.context_length == len(found.prompt_ids) + start
        start += step.record.emitted[0]


def test_nodes_of_the_head_have_its_scores_and_the_looked_up_ones_come_last(found: Examination) -> None:
    for step in found.steps:
        last = step.tree.node_count - len(found_at(step, "lookup"))
        assert found_at(step, "lookup") == list(range(last, step.tree.node_count))
        assert bool((step.tree.scores[0, 1:] < 0).all())
        assert last == 6 or step.record.shape.depth < 3
        proposed = step.record.proposed
        assert proposed.lookup == len(set(step.path) & set(found_at(step, "lookup")))
        assert proposed.both == len(set(step.path) & set(found_at(step, "both")))
        assert sum(proposed) == int(step.record.accepted)
    assert any(found_at(step, "lookup") for step in found.steps)


def test_levels_are_those_that_were_drafted(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class TwoLevels(FixedPolicy):
        grows = True

        def grow(self, level: Any) -> bool:
            return bool(level.depth < 2)

    found = examined(tiny_target, tiny_head, TwoLevels(SHAPE), prompt)
    whole = [step for step in found.steps if step.record.shape == SHAPE]
    assert whole and all(step.levels == 2 for step in whole)
    for step in whole:
        by_the_head = step.tree.node_count - len(found_at(step, "lookup"))
        assert int(step.tree.depths[0, :by_the_head].max()) <= 2


def test_a_chain_through_nodes_of_the_head_is_both_sources() -> None:
    step = merged_step()
    assert found_at(step, "lookup") == [4]
    assert found_at(step, "both") == [1, 3]


def test_the_policy_decides_as_if_nobody_looked(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class Told(FixedPolicy):
        def __init__(self) -> None:
            super().__init__(SHAPE)
            self.records: list[Any] = []

        def observe(self, record: Any) -> None:
            self.records.append(record)

    policy = Told()
    found = examined(tiny_target, tiny_head, policy, prompt)
    assert policy.records == [step.record for step in found.steps]
    assert all(step.chosen == SHAPE for step in found.steps)
    assert repr(StepRecorder(policy)) == repr(policy)


def test_a_policy_of_another_head_is_refused_as_if_nobody_looked(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class Foreign(FixedPolicy):
        head_identity = {"vocab_size": 7}

        def check_identity(self, **given: Any) -> None:
            raise ValueError(f"made for another {' and '.join(given)}")

    with pytest.raises(ValueError, match="made for another target and head"):
        examined(tiny_target, tiny_head, Foreign(SHAPE), prompt)


def test_lookup_alone_needs_no_head(tiny_target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    policy = BaselineGuard(ThroughputPolicy())
    assert not StepRecorder(policy).needs_head
    assert StepRecorder(FixedPolicy(SHAPE)).needs_head
    found = examined(tiny_target, None, policy, prompt)
    assert found.parts_at is None
    assert all(len(found_at(step, "lookup")) == step.tree.node_count - 1 and step.levels == 0 for step in found.steps)


def test_a_sampled_examination_equals_plain_sampling_and_leaves_the_generator_alone(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    state = torch.random.get_rng_state()
    settings = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.7}
    policy = FixedPolicy(SHAPE)
    found = examine(attach(tiny_target), tiny_head, policy, prompt["input_ids"][0], settings=settings, seed=3)
    other = examine(attach(tiny_target), tiny_head, policy, prompt["input_ids"][0], settings=settings, seed=4)
    assert found.parts_at is None and found.divergence is None
    assert found.report.answers != other.report.answers
    assert torch.equal(state, torch.random.get_rng_state())
