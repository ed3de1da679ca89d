"""Acceptance that recorded texts tell: against draws from known ones, and the recordings of a head."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import DraftHead
from transformers_resps.heads import pair_identity
from transformers_resps.replay import RankedText, RecordedText, fitted_policy, record_pools
from transformers_resps.replay.fitted_policy import fit_platt_scaling
from transformers_resps.tree import CandidatePool


def test_the_probabilities_that_outcomes_were_drawn_from_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, generator=generator).mul(0.98).add(0.01).log()
    logits = -0.4 + 0.7 * (scores - torch.log1p(-scores.exp()))
    accepted = torch.rand(len(scores), generator=generator) < logits.sigmoid()
    found = fit_platt_scaling(scores, accepted)
    assert found.intercept == pytest.approx(-0.4, abs=0.05) and found.slope == pytest.approx(0.7, abs=0.05)


def test_without_outcomes_the_heads_own_word_stands_and_a_few_do_not_overrule_it() -> None:
    nothing = fit_platt_scaling(torch.empty(0), torch.empty(0))
    assert (nothing.intercept, nothing.slope) == (0.0, 1.0)
    once = fit_platt_scaling(torch.tensor([math.log(0.5)]), torch.tensor([True]))
    assert 0.5 < once(math.log(0.5)) < 0.75


def test_a_node_is_accepted_when_the_text_follows_its_whole_path() -> None:
    """By hand: after the root come 5 and 6; a pool of two levels and two children holds 5 -> 6, and 9 -> 6."""
    tokens, parents = torch.tensor([[5, 9, 6, 7, 6, 8]]), torch.tensor([[-1, -1, 0, 0, 1, 1]])
    scores = torch.tensor([[0.6, 0.3, 0.5, 0.1, 0.2, 1e-4]]).log()  # the last one is never verified
    pool = CandidatePool(tokens, parents, scores, torch.tensor([1, 1, 2, 2, 2, 2]))
    text = RecordedText(torch.tensor([1, 2, 5, 6]), 1, torch.zeros(1, 3), {2: pool})
    policy = fitted_policy([text], top_k=2)
    first = fit_platt_scaling(scores[0, :2], torch.tensor([True, False]))
    second = fit_platt_scaling(scores[0, 2:5], torch.tensor([True, False, False]))
    assert policy.acceptance.scalings[:2] == (first, second) and policy.acceptance.scalings[3] == fit_platt_scaling(
        torch.empty(0), torch.empty(0)
    )
    short = RecordedText(torch.tensor([1, 2, 5]), 1, torch.zeros(1, 3), {2: pool})  # of level 2 it tells nothing
    assert fitted_policy([short], top_k=2).acceptance.scalings[1] == policy.acceptance.scalings[3]


def test_a_recording_without_such_pools_is_refused(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    text = record_pools(tiny_target, tiny_head, torch.arange(3, 15), 4, depths={2: 3})
    identity = pair_identity(tiny_target, tiny_head)
    fitted = fitted_policy([text], top_k=2, **identity)
    assert fitted.acceptance.scalings[0].slope > 0 and fitted.to_config().items() >= identity.items()
    with pytest.raises(ValueError, match=r"pools of top_k \[2\], but 4 is to be fitted.*record_pools"):
        fitted_policy([text])
    for texts, came in (([], "no texts"), ([RankedText.from_recording(text)], "a RankedText")):
        with pytest.raises(ValueError, match=f"Got {came}, but .* Make them with `record_pools`"):
            fitted_policy(texts)  # type: ignore[arg-type]
