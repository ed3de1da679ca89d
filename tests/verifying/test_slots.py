"""Buffers of slots: entries keep their places while buffers grow, rows go and windows are handed out."""

import pytest
import torch

from tests.verifying.filled_cache import filled_cache
from transformers_resps.verifying.slots import SlotBuffers, filled_layers, padded_count


LENGTH = 5
SLOTS = [[0, 2, 1, 4], [3, 1, 0, 2]]  # of each row, in the order of a text


@pytest.fixture
def buffers() -> SlotBuffers:
    """Two rows of five entries, and a copy of the last row."""
    buffers = SlotBuffers()
    buffers.fill(filled_layers(filled_cache(LENGTH, rows=2)), LENGTH, 3, 16)
    return buffers


def test_entries_come_back_in_the_order_of_each_rows_text_also_from_larger_buffers(buffers: SlotBuffers) -> None:
    (layer,) = filled_layers(filled_cache(LENGTH, rows=2))
    for size in (16, 40):
        if buffers.size < size:
            buffers.grow(size)
        keys, values = buffers.entries(SLOTS)
        assert buffers.size == size
        for row, slots in enumerate(SLOTS):
            assert torch.equal(keys[row], layer.keys[row, :, slots])
            assert torch.equal(values[row], layer.values[row, :, slots])


@pytest.mark.parametrize("rows", [[1], [1, 0, 0]], ids=["fewer", "as many"])
def test_rows_that_are_kept_keep_their_entries(buffers: SlotBuffers, rows: list[int]) -> None:
    before = buffers.entries([SLOTS[0]] * 3)
    buffers.keep_rows(rows)
    for found, expected in zip(buffers.entries([SLOTS[0]] * len(rows)), before, strict=True):
        assert torch.equal(found, expected[rows])


def test_a_window_is_the_same_tensors_at_every_call_and_writes_to_the_buffers(buffers: SlotBuffers) -> None:
    window = buffers.window(8)
    assert all(part is again for part, again in zip(window, buffers.window(8), strict=True))
    assert {part.shape[0] for part in window} == {8} and not any(part._is_view() for part in window)
    window[0][2] = -1.0
    assert (buffers.entries([[2]] * 3)[0] == -1.0).all()


def test_the_next_text_finds_the_same_buffers_unless_it_needs_others(buffers: SlotBuffers) -> None:
    first = buffers.window(8)[0]
    buffers.fill(filled_layers(filled_cache(3, rows=3)), 3, 3, 16)
    assert buffers.window(8)[0] is first
    buffers.fill(filled_layers(filled_cache(3, rows=2)), 3, 2, 16)
    assert buffers.window(8)[0].shape[:2] == (8, 2)


def test_a_graph_serves_many_sizes_of_trees() -> None:
    counts = range(1, 257)
    captured = [padded_count(torch.device("cuda"), count) for count in counts]
    assert all(padded >= count for padded, count in zip(captured, counts, strict=True))
    assert len(set(captured)) < 12
    assert [padded_count(torch.device("cpu"), count) for count in (1, 2, 9)] == [2, 2, 9]
