"""The figures behind the near-tie rule can be measured again."""

import pytest
import torch

from tests.conftest import build_target
from transformers_resps.testing.divergence import move_of_gaps


PROMPTS = [torch.arange(3, 12), torch.arange(20, 25)]


def test_a_tree_of_one_node_is_a_plain_step_bit_for_bit_where_heads_share_no_keys() -> None:
    target = build_target(num_key_value_heads=4)
    [one] = move_of_gaps(target, PROMPTS, 12, [1])
    assert one.equal_rows == len(one.moves) == 24 and one.equal_logits == 1
    assert float(one.moves.max()) == 0 and not len(one.flipped)


@pytest.mark.parametrize("window", [None, 6])
def test_in_double_precision_nothing_moves_by_more_than_rounding(window: int | None) -> None:
    """So chains, positions and windows are those of one-token decoding: a wrong mask would move gaps by thousands."""
    target = build_target("mistral", sliding_window=window, initializer_range=0.3).double()
    for moved in move_of_gaps(target, PROMPTS, 12, [2, 5, 0]):
        assert float(moved.moves.max()) < 2000 and not len(moved.flipped)


def test_in_half_precision_gaps_move_by_few_spacings() -> None:
    target = build_target(initializer_range=0.3).bfloat16()
    moved = move_of_gaps(target, PROMPTS, 40, [8])[0]
    assert 0 < float(moved.moves.max()) < 50
    assert f"{len(moved.flipped)} flips" in str(moved)
