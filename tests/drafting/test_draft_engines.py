"""What a model keeps for its heads: compiled once each, also when they take turns."""

import copy

import pytest
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, attach
from transformers_resps.drafting.levels import DraftEngine, DraftEngines
from transformers_resps.heads import BoundHead


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


def lent(engines: DraftEngines, head: DraftHead, target: PreTrainedModel) -> DraftEngine | None:
    with engines.borrow(BoundHead(head, target)) as engine:
        return engine


def test_heads_that_take_turns_keep_their_engines_and_the_one_not_used_for_longest_loses_its_own(
    target: PreTrainedModel,
) -> None:
    engines, heads = DraftEngines(), [DraftHead.from_target(target) for _ in range(5)]
    first = [lent(engines, head, target) for head in heads[:4]]
    assert len(set(first)) == 4
    assert [lent(engines, head, target) for head in heads[:4]] == first
    lent(engines, heads[0], target)
    lent(engines, heads[4], target)
    assert lent(engines, heads[0], target) is first[0]
    assert lent(engines, heads[1], target) is not first[1]


def test_without_a_head_there_is_none_and_a_copy_of_the_model_starts_anew(target: PreTrainedModel) -> None:
    engines, head = DraftEngines(), DraftHead.from_target(target)
    with engines.borrow(None) as engine:
        assert engine is None
    first = lent(engines, head, target)
    assert lent(copy.deepcopy(engines), head, target) is not first
