"""The rigged head: right as often as was planted, lossless, and as expensive as the head that it is."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.generation.answering import both
from training.studies.random_llama import random_llama
from training.studies.rigged_head import RiggedHead, hit_rate_for, tau_of
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import candidate_generator
from transformers_resps.tree import CandidatePool


PROMPT = torch.arange(5, 12)
MOST = 80  # new tokens


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(random_llama("tiny"))


@pytest.fixture(scope="module")
def text(target: PreTrainedModel) -> Tensor:
    written: Tensor = target.generate(PROMPT[None], max_new_tokens=MOST, do_sample=False)[0]
    return written


def expected_steps(hits: list[bool], depth: int) -> list[int]:
    """Tokens of each step by hand: those that are right from here on, at most `depth`, and the target's own."""
    place, steps = len(PROMPT) + 1, [1]
    while place < len(hits):
        most = min(depth, len(hits) - place - 1)
        right = next((count for count in range(most) if not hits[place + count]), most)
        steps.append(right + 1)
        place += right + 1
    return steps


@pytest.mark.parametrize(("tau", "depth"), [(1.0, 3), (2.0, 3), (3.0, 5), (4.0, 7), (4.0, 4), (8.0, 7)])
def test_the_rate_for_a_tau_follows_from_the_formula(tau: float, depth: int) -> None:
    rate = hit_rate_for(tau, depth)
    assert tau_of(rate, depth) == pytest.approx(tau)
    if rate < 1 - 1e-6:
        assert (1 - rate ** (depth + 1)) / (1 - rate) == pytest.approx(tau)


def test_a_tau_beyond_the_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="yields 1 to 4 tokens per step, never 5. Pass a deeper shape"):
        hit_rate_for(5.0, 3)


@pytest.mark.parametrize(
    ("tau", "shape"),
    [(2.0, TreeShape(4, 3, 1)), (3.0, TreeShape(40, 5, 4)), (4.0, TreeShape(8, 7, 1)), (4.0, TreeShape(60, 8, 10))],
    ids=str,
)
def test_a_step_accepts_up_to_the_first_planted_error(
    tau: float, shape: TreeShape, target: PreTrainedModel, text: Tensor
) -> None:
    head = RiggedHead.for_texts(target, [text])
    hits = head.plant(text, hit_rate_for(tau, shape.depth))
    plain, rigged = both(target, head, PROMPT[None], shape, max_new_tokens=MOST)
    assert rigged.sequences.tolist() == plain.sequences.tolist()
    assert [int(step.emitted) for step in rigged.speculation.steps] == expected_steps(hits.tolist(), shape.depth)


@pytest.mark.parametrize(("tau", "depth"), [(2.0, 3), (3.0, 5), (4.0, 7)])
def test_planted_errors_give_the_tau_that_was_asked_for(tau: float, depth: int, text: Tensor) -> None:
    head = RiggedHead.for_texts(random_llama("tiny"), [text])
    steps = [
        step
        for seed in range(60)
        for step in expected_steps(head.plant(text, hit_rate_for(tau, depth), seed).tolist(), depth)[1:-depth]
    ]
    assert sum(steps) / len(steps) == pytest.approx(tau, rel=0.05)


def test_texts_of_half_precision_are_those_of_plain_decoding_and_sampled_ones_too() -> None:
    target = attach(random_llama("tiny", torch.bfloat16))
    text = target.generate(PROMPT[None], max_new_tokens=32, do_sample=False)[0]
    head = RiggedHead.for_texts(target, [text], draft_vocab_size=200)
    assert len(head.draft_token_ids) == 200
    head.plant(text, 0.8)
    for do_sample in (False, True):
        plain, rigged = both(target, head, PROMPT[None], TreeShape(8, 7, 1), max_new_tokens=32, do_sample=do_sample)
        assert rigged.sequences.tolist() == plain.sequences.tolist()
        assert rigged.speculation.tau > 2


def test_a_first_choice_is_as_probable_as_it_is_right_and_the_right_token_is_the_last_where_it_errs(
    target: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[CandidatePool] = []
    grow = candidate_generator.grow_pool

    def noted(*args: object, **keywords: object) -> CandidatePool:
        pools.append(grow(*args, **keywords))  # type: ignore[arg-type]
        return pools[-1]

    monkeypatch.setattr(candidate_generator, "grow_pool", noted)
    head, everything = RiggedHead.for_texts(target, [text]), FixedPolicy(TreeShape(513, 1, 512))
    hits = head.plant(text, 0.6)
    for place in range(len(PROMPT) + 1, len(text) - 1, 6):
        target.generate(text[None, : place - 1], assistant_model=head, policy=everything, max_new_tokens=3)
        tokens = pools[-1].tokens[0]
        assert (tokens[0] if hits[place] else tokens[-1]) == text[place]
    first = [pool.scores[0].exp().max().item() for pool in pools]
    assert sum(first) / len(first) == pytest.approx(0.6, abs=0.05)


def test_its_layers_run_whatever_it_proposes(
    target: PreTrainedModel, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rigged head calls its layers as often as a head of the same sizes that drafts the same trees."""
    forwards: dict[type, int] = {}
    forward = DraftHead.forward

    def counted(self: DraftHead, *args: object, **keywords: object) -> Tensor:
        forwards[type(self)] = forwards.get(type(self), 0) + 1
        return forward(self, *args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(DraftHead, "forward", counted)
    rigged = RiggedHead.for_texts(target, [text])
    rigged.plant(text, 0.0)
    for head in (rigged, DraftHead.from_target(target)):
        both(target, head, PROMPT[None], TreeShape(4, 3, 1), max_new_tokens=8)
    assert forwards[RiggedHead] == forwards[DraftHead] > 8


def test_a_text_that_it_was_not_made_for_is_refused(target: PreTrainedModel, text: Tensor) -> None:
    head = RiggedHead.for_texts(target, [text[:40]], draft_vocab_size=45)
    for other in (text, 511 - text[:40]):
        with pytest.raises(ValueError, match="made for other texts"):
            head.plant(other, 0.5)


def test_making_and_planting_leave_the_global_generator_alone(target: PreTrainedModel, text: Tensor) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    RiggedHead.for_texts(target, [text]).plant(text, 0.5)
    random_llama("tiny")
    assert torch.rand(1) == expected
