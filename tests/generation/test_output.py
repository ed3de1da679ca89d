"""Where answers end, and how prompts share a batch."""

from types import SimpleNamespace

import pytest
import torch

from transformers_resps.generation.output import end_ids, left_padded, up_to_end


@pytest.mark.parametrize(("named", "found"), [(None, set()), (2, {2}), (0, {0}), ([2, 5], {2, 5}), ([], set())])
def test_a_model_names_no_end_token_or_one_or_several(named: int | list[int] | None, found: set[int]) -> None:
    assert end_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))) == found


def test_a_model_without_generation_settings_ends_nowhere() -> None:
    assert end_ids(SimpleNamespace(generation_config=None)) == end_ids(SimpleNamespace()) == frozenset()


@pytest.mark.parametrize(
    ("answer", "kept"), [([5, 2, 7, 2], [5, 2]), ([3, 2], [3]), ([2], [2]), ([5, 6], [5, 6]), ([], [])]
)
def test_an_answer_is_kept_up_to_its_first_end_token(answer: list[int], kept: list[int]) -> None:
    assert up_to_end(answer, {2, 3}) == kept
    assert up_to_end(torch.tensor(answer, dtype=torch.long), {2, 3}).tolist() == kept


def test_without_end_tokens_the_whole_answer_is_kept() -> None:
    assert up_to_end([0, 1, 2], frozenset()) == [0, 1, 2]


def test_shorter_prompts_stand_behind_masked_zeros() -> None:
    ids, mask = left_padded([torch.tensor([4, 5, 6]), torch.tensor([7])])
    assert ids.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]] and mask.dtype == torch.long
