"""What each row has in a cache, and where its next entries go."""

import torch

from transformers_resps.target.slots import SlotMap


CPU = torch.device("cpu")


def test_every_row_goes_on_at_its_own_end() -> None:
    prefix = SlotMap(torch.tensor([[0, 1], [1, 1], [1, 1]]))
    prefix.extend([2, 2, 2])
    assert prefix.is_even and prefix.length == 2
    assert prefix.next_slots([1, 3, 2], CPU).tolist() == [[2, 2, 2], [2, 3, 4], [2, 3, 3]]
    prefix.extend([1, 3, 2])
    assert not prefix.is_even and prefix.length == 5
    assert prefix.next_slots([2, 1, 1], CPU).tolist() == [[3, 4], [5, 5], [4, 4]]
    seen = prefix.visible(6, CPU)
    assert seen is not None
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]
    prefix.keep_rows([0, 2])
    assert prefix.length == 4 and not prefix.is_even
    prefix.keep_rows([0])
    assert prefix.length == 3 and prefix.is_even


def test_rows_without_padding_that_end_alike_need_no_mask() -> None:
    prefix = SlotMap(None)
    prefix.extend([4, 4])
    prefix.extend([1, 3])
    assert prefix.visible(7, CPU) is not None
    prefix.extend([3, 1])
    assert prefix.is_even and prefix.visible(8, CPU) is None
