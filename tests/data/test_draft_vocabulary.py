"""Which tokens a head can propose."""

import pytest
import torch

from tests.targets import Architecture
from transformers_resps import DraftHead
from transformers_resps.data import Example, choose_draft_vocabulary, vocabulary_of


TEXT = Example(torch.tensor([3, 4, 5, 5]), torch.tensor([False, False, True, True]))


@pytest.mark.parametrize("odd", [-1, 19])
def test_forced_tokens_are_the_targets(odd: int) -> None:
    """A tokenizer may know an end token that its model does not; -1 forced the last one in."""
    with pytest.raises(ValueError, match="forced tokens go from .*but the target's ids go from 0 to 18. Leave out"):
        choose_draft_vocabulary([TEXT], 19, 8, always=[2, odd])
    assert choose_draft_vocabulary([TEXT], 19, 3, always=[2]).token_ids.tolist() == [0, 2, 5]


def test_labels_are_no_tokens() -> None:
    labels = Example(torch.tensor([3, -100, 5]), TEXT.loss_mask[:3])
    with pytest.raises(ValueError, match="token id -100, but .* 19 tokens.*or holds labels: tokenize it"):
        choose_draft_vocabulary([labels], 19, 8)


def test_a_vocabulary_is_not_counted_from_tokens_of_another_tokenizer():
    example = Example(torch.tensor([3, 9, 12]), torch.tensor([False, True, True]))
    with pytest.raises(ValueError, match="token id 12, but the target's vocabulary has 12 tokens. It was"):
        choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=4)


def test_vocabulary_is_the_most_frequent_tokens_with_the_forced_ones():
    mask = torch.tensor([False, *[True] * 9])
    example = Example(torch.tensor([3, 9, 9, 9, 5, 5, 7, 7, 1, 4]), mask)
    vocabulary = choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=4, always=[11])
    assert vocabulary.token_ids.tolist() == [5, 7, 9, 11]
    assert vocabulary.coverage == pytest.approx(7 / 9)
    with pytest.raises(ValueError, match="draft_vocab_size"):
        choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=13)


def answered(tokens: list[int]) -> Example:
    """All but the first token are the assistant's."""
    return Example(torch.tensor(tokens), torch.arange(len(tokens)) >= 1)


def test_coverage_is_counted_by_hand_and_none_at_all_refused() -> None:
    target = Architecture("llama").build("sdpa").float()
    head = DraftHead.from_target(target, draft_token_ids=torch.tensor([4, 5]))
    assert vocabulary_of(head, [answered([4, 4, 5, 6, 7]), answered([1, 7])]).coverage == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="none of them occurs"):
        vocabulary_of(head, [answered([4, 6, 7])])
