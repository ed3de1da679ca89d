"""What each row has in a cache, and where its next entries go: in the order of the text, or in any slots."""

import torch

from transformers_resps.verifying.rows import HIDDEN, SlotMap, SlotTable


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


def test_the_slots_of_rejected_nodes_are_offered_again_before_new_ones() -> None:
    table = SlotTable([[True] * 3])
    assert table.offer(4) == [[3, 4, 5, 6]]
    table.keep([[0, 2]])
    assert table.rows == [[0, 1, 2, 3, 5]] and table.lengths == [5]
    assert table.offer(3) == [[4, 6, 7]]
    assert table.offer(2) == [[4, 6]]  # nothing was kept meanwhile
    table.keep([[0]])
    assert table.offer(2) == [[6, 7]]
    assert table.rows == [[0, 1, 2, 3, 5, 4]]


def test_places_count_the_entries_of_the_text_and_hide_padding_and_free_slots() -> None:
    table = SlotTable([[True, True, True], [False, True, True]])
    table.offer(3)
    table.keep([[0, 2], [0]])
    expected = [[0, 1, 2, 3, HIDDEN, 4, HIDDEN, HIDDEN], [HIDDEN, 1, 2, 3, HIDDEN, HIDDEN, HIDDEN, HIDDEN]]
    assert table.places(8).tolist() == expected
    table.keep_rows([1, 1])
    assert table.places(8).tolist() == [expected[1]] * 2 and table.lengths == [4, 4]


def test_no_slot_is_ever_in_two_places() -> None:
    generator = torch.Generator().manual_seed(0)
    table = SlotTable([[True] * 4, [True] * 4])
    for _ in range(60):
        count = int(torch.randint(1, 12, (), generator=generator))
        offered = table.offer(count)
        for row, slots in zip(table.rows, offered, strict=True):
            assert len(set(slots)) == count and slots == sorted(slots) and not set(slots) & set(row)
            assert max(slots) < table.size
        kept = [sorted({0, int(torch.randint(0, count, (), generator=generator))}) for _ in range(2)]
        table.keep(kept)
        assert all(len(set(row)) == len(row) for row in table.rows)
    assert table.size <= max(table.lengths) + 24  # rejected nodes leave no holes
