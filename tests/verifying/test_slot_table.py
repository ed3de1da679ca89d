"""Slots of a batch: accepted nodes stay where they are, and the slots of the others are used again."""

import torch

from transformers_resps.verifying.slots import HIDDEN, SlotTable


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
