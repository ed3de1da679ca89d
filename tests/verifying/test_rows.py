"""What each row has in a cache, and where its next entries go: in the order of the text, or in any slots."""

import torch

from transformers_resps.verifying.rows import SlotMap


CPU = torch.device("cpu")


def test_every_row_goes_on_at_its_own_end() -> None:
    prefix = SlotMap(torch.tensor([[0, 1], [1, 1], [1, 1]]))
    prefix.extend([2, 2, 2])
    assert prefix.is_even and prefix.length == 2
    assert not prefix.stays_even([[1, 3, 2]])
    assert prefix.take([[1, 3, 2]], CPU).tolist() == [[2, 2, 2], [2, 3, 4], [2, 3, 3]]
    assert not prefix.is_even and prefix.length == 5
    seen = prefix.visible(6, CPU)
    assert seen is not None
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]
    assert prefix.take([[2, 1, 1]], CPU, ahead=2).tolist() == [[3, 4, 5, 6], [5, 5, 6, 7], [4, 4, 5, 6]]
    assert prefix.ends(CPU).tolist() == [[5], [6], [5]]
    prefix.keep_rows([0, 1])
    assert prefix.length == 6 and not prefix.is_even
    prefix.keep_rows([0])
    assert prefix.length == 5 and prefix.is_even


def test_slots_are_taken_block_by_block() -> None:
    even, uneven = SlotMap(None), SlotMap(None)
    assert even.take([[2, 2], [1, 1]], CPU, ahead=1).tolist() == [[0, 1, 2, 3]]
    assert uneven.take([[2, 1], [1, 2]], CPU, ahead=1).tolist() == [[0, 1, 2, 2, 3], [0, 0, 1, 2, 3]]
    assert even.is_even and uneven.is_even and even.length == uneven.length == 3
    assert uneven.ends(CPU).tolist() == [[3]]


def test_rows_without_padding_that_end_alike_need_no_mask() -> None:
    prefix = SlotMap(None)
    prefix.extend([4, 4])
    prefix.extend([1, 3])
    assert prefix.visible(7, CPU) is not None
    prefix.extend([3, 1])
    assert prefix.is_even and prefix.visible(8, CPU) is None


def test_slots_that_are_forgotten_leave_the_others_in_order() -> None:
    rows = SlotMap(torch.tensor([[1, 1, 1], [0, 0, 1]]))
    rows.extend([3, 3])
    rows.extend([2, 1])
    rows.forget(1)
    assert rows.take([[1, 2]], CPU).tolist() == [[4, 4], [3, 4]]
    seen = rows.visible(5, CPU)
    assert seen is not None and seen.int().tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    rows.forget(3)
    assert rows.length == 2 and rows.is_even and rows.visible(2, CPU) is None and rows.pads is None


def test_padding_of_the_prompt_is_told_from_text_at_any_length() -> None:
    padded = SlotMap(torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert padded.unpadded(5, 3, CPU).tolist() == [[True] * 5, [False] + [True] * 4, [False] + [True] * 4]
    assert padded.unpadded(2, 2, CPU).tolist() == [[True] * 2, [False, True]]
    assert SlotMap(None).unpadded(2, 1, CPU).tolist() == [[True] * 2]
