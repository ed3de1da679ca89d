"""Where two outputs differ first, and what rounding explains."""

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps.testing.divergence import MAX_SPACINGS, Divergence, explain_divergence, spacing_at


Prompt = dict[str, torch.Tensor]


def answer(target: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    return target.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 7:]


def test_equal_answers_have_no_divergence(tiny_target: PreTrainedModel, prompt: Prompt) -> None:
    text = answer(tiny_target, prompt)
    assert explain_divergence(tiny_target, prompt["input_ids"][0], text, text.clone()) is None


def test_a_wrong_token_is_found_at_its_place_and_not_explained(tiny_target: PreTrainedModel, prompt: Prompt) -> None:
    plain = answer(tiny_target, prompt)
    wrong = plain.clone()
    wrong[5] = (wrong[5] + 1) % 64
    found = explain_divergence(tiny_target, prompt["input_ids"][0], plain, wrong)
    assert found is not None
    assert (found.position, found.plain_token, found.speculative_token) == (5, int(plain[5]), int(wrong[5]))
    assert found.plain_logit == found.best_logit > found.speculative_logit
    assert not found.explained
    assert "position 5" in str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tie_is_explained_in_half_precision_only(
    tiny_target: PreTrainedModel, prompt: Prompt, dtype: torch.dtype
) -> None:
    tiny_target.to(dtype)
    plain = answer(tiny_target, prompt)
    twin = (int(plain[0]) + 1) % 64
    output = tiny_target.get_output_embeddings().weight.data
    output[twin] = output[plain[0]]
    found = explain_divergence(tiny_target, prompt["input_ids"][0], plain, torch.tensor([twin]))
    assert found is not None and found.gap == 0
    assert found.explained == (dtype == torch.bfloat16)


def test_an_answer_that_stops_early_is_not_explained(tiny_target: PreTrainedModel, prompt: Prompt) -> None:
    plain = answer(tiny_target, prompt)
    found = explain_divergence(tiny_target, prompt["input_ids"][0], plain, plain[:3])
    assert found is not None
    assert found.position == 3 and found.speculative_token is None and not found.explained


def test_two_tokens_that_tie_far_below_the_best_are_not_explained() -> None:
    assert not Divergence(0, 1, 2, 3.0, 3.0, best_logit=9.0, dtype=torch.bfloat16).explained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [-20.0, 0.3, 1.0, 31.9])
def test_the_spacing_is_the_distance_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    number = torch.tensor(abs(value), dtype=dtype)
    following = torch.nextafter(number, torch.tensor(torch.inf, dtype=dtype))
    assert spacing_at(value, dtype) == float(following) - float(number)


def test_the_limit_is_in_spacings_of_the_dtype() -> None:
    spacing = spacing_at(20.0, torch.bfloat16)
    assert Divergence(0, 1, 2, 20.0, 20.0 - MAX_SPACINGS * spacing, 20.0, torch.bfloat16).explained
    assert not Divergence(0, 1, 2, 20.0, 20.0 - (MAX_SPACINGS + 1) * spacing, 20.0, torch.bfloat16).explained
