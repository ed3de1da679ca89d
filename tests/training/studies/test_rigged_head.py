"""Rigged heads: right as often as was planted, lossless, and as expensive as trained ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lossless.answering import both
from training.studies.random_target import following, random_target
from training.studies.rigged_head import hit_rate_for, rigged_head, tau_of
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.heads.model import DraftLayer


PROMPT = torch.arange(5, 12)
MOST = 80  # new tokens
AFTER = following(512)


@pytest.fixture(scope="module")
def target() -> Any:
    return attach(random_target("tiny"))


def expected_steps(hits: Tensor, text: list[int], depth: int) -> list[int]:
    """Tokens of each step by hand: those that are right from here on, at most `depth`, and the target's own."""
    place, steps = len(PROMPT) + 1, [1]
    while place < len(text):
        most = min(depth, len(text) - place - 1)
        right = next((count for count in range(most) if not hits[text[place - 1 + count]]), most)
        steps.append(right + 1)
        place += right + 1
    return steps


def test_the_target_writes_along_one_cycle_through_its_vocabulary(target: Any) -> None:
    seen, token = set(), 0
    while token not in seen:
        seen.add(token)
        token = int(AFTER[token])
    assert len(seen) == len(AFTER) == target.config.vocab_size
    text = target.generate(PROMPT[None], max_new_tokens=MOST, do_sample=False)[0]
    assert text[len(PROMPT) :].tolist() == AFTER[text[len(PROMPT) - 1 : -1]].tolist()


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
def test_a_step_accepts_up_to_the_first_planted_error(tau: float, shape: TreeShape, target: Any) -> None:
    head = rigged_head(target, AFTER, hit_rate_for(tau, shape.depth)).head
    plain, drafted = both(target, head, PROMPT[None], shape, max_new_tokens=MOST)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    steps = [int(step.emitted) for step in drafted.speculation.steps]
    hits = choices(head, target).indices[:, 0] == AFTER
    assert steps == expected_steps(hits, plain.sequences[0].tolist(), shape.depth)


@pytest.mark.parametrize(("tau", "depth"), [(2.0, 3), (3.0, 5), (4.0, 7)])
def test_planted_errors_give_the_tau_that_was_asked_for(tau: float, depth: int, target: Any) -> None:
    text, steps = [*PROMPT.tolist()], []
    while len(text) < len(AFTER):
        text.append(int(AFTER[text[-1]]))
    for seed in range(12):
        steps += expected_steps(rigged_head(target, AFTER, hit_rate_for(tau, depth), seed=seed).hits, text, depth)[
            1:-depth
        ]
    assert sum(steps) / len(steps) == pytest.approx(tau, rel=0.05)


def test_texts_of_half_precision_are_those_of_plain_decoding_and_sampled_ones_too() -> None:
    target = attach(random_target("tiny", torch.bfloat16))
    text = target.generate(PROMPT[None], max_new_tokens=32, do_sample=False)[0]
    head = rigged_head(target, AFTER, 0.8, tokens=text, draft_vocab_size=200).head
    assert head.bind(target).proposable_tokens == 200
    for do_sample in (False, True):
        plain, drafted = both(target, head, PROMPT[None], TreeShape(8, 7, 1), max_new_tokens=32, do_sample=do_sample)
        assert drafted.sequences.tolist() == plain.sequences.tolist()
        assert drafted.speculation.tau > 2


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_a_first_choice_is_as_probable_as_it_is_right_and_the_right_token_is_the_last_where_it_errs(
    rate: float, target: Any
) -> None:
    head, hits = rigged_head(target, AFTER, rate)
    probs, found = choices(head, target)
    as_planted = torch.where(hits, found[:, 0], found[:, -1]) == AFTER
    assert as_planted.float().mean() > 0.94, "64 numbers leave little room for 512 directions"
    assert ((found[:, 0] == AFTER) <= hits).all()
    assert hits.float().mean().item() == pytest.approx(rate, abs=0.06)
    assert probs[:, 0].mean().item() == pytest.approx(rate, abs=0.08)


def choices(head: Any, target: Any) -> torch.return_types.sort:
    """Probabilities `[v, d]` after each token, and the tokens that have them; the likeliest first."""
    bound = head.bind(target)
    found = bound.logits(bound.embed(torch.arange(512)[None]))[0].softmax(-1).sort(dim=-1, descending=True)
    return torch.return_types.sort((found.values, bound.target_ids(found.indices)))


def test_its_layers_run_whatever_it_proposes(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as those of one of the same sizes that drafts the same trees."""
    ran: list[int] = []
    forward = DraftLayer.forward

    def counted(self: Any, *args: Any, **keywords: Any) -> Tensor:
        ran[-1] += 1
        return forward(self, *args, **keywords)

    monkeypatch.setattr(DraftLayer, "forward", counted)
    for head in (rigged_head(target, AFTER, 0.0).head, DraftHead.from_target(target)):
        ran.append(0)
        both(target, head, PROMPT[None], TreeShape(4, 3, 1), max_new_tokens=8)
    assert ran[0] == ran[1] > 8


def test_rows_of_a_batch_draft_each_its_own_text(target: Any) -> None:
    ids = torch.stack([PROMPT, PROMPT + 40])
    head = rigged_head(target, AFTER, 1.0).head
    plain, drafted = both(target, head, ids, TreeShape(4, 3, 1), max_new_tokens=24, do_sample=False)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert len(drafted.speculation.steps) < 10


def test_making_one_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rigged_head(random_target("tiny"), AFTER, 0.5)
    assert torch.rand(1) == expected


def test_a_policy_drafts_with_it_as_with_any_head(target: Any) -> None:
    policy = FixedPolicy(TreeShape(4, 3, 1))
    options = {
        "assistant_model": rigged_head(target, AFTER, 0.9).head,
        "policy": policy,
        "return_dict_in_generate": True,
    }
    assert target.generate(PROMPT[None], max_new_tokens=MOST, **options).speculation.tau > 3
