"""Which tokens a head can propose; counting them is tested with the examples."""

import pytest
import torch

from transformers_resps.data import Example, choose_draft_vocabulary


TEXT = Example(torch.tensor([3, 4, 5, 5]), torch.tensor([False, False, True, True]))


@pytest.mark.parametrize("odd", [-1, 19])
def test_forced_tokens_are_the_targets(odd: int) -> None:
    """A tokenizer may know an end token that its model does not; -1 forced the last one in."""
    with pytest.raises(ValueError, match="forced tokens go from .*but the target's ids go from 0 to 18. Leave out"):
        choose_draft_vocabulary([TEXT], 19, 8, always=[2, odd])
    assert choose_draft_vocabulary([TEXT], 19, 3, always=[2]).token_ids.tolist() == [0, 2, 5]


def test_labels_are_no_tokens() -> None:
    labels = Example(torch.tensor([3, -100, 5]), TEXT.loss_mask[:3])
    with pytest.raises(ValueError, match="token id -100, but .* 19 tokens.*or are labels: tokenize them"):
        choose_draft_vocabulary([labels], 19, 8)
