"""Buffers of slots: entries keep their places while buffers grow and rows go."""

from collections.abc import Sequence
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.compilation.as_it_is import AsItIs
from tests.targets import ARCHITECTURES, Architecture
from tests.verifying.filled_cache import filled_cache
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.attention import attend
from transformers_resps.verifying.invariant import attention
from transformers_resps.verifying.invariant.attention import BLOCK, BlockLayout
from transformers_resps.verifying.invariant.forwards import InvariantForward
from transformers_resps.verifying.slots import engine as slots_module
from transformers_resps.verifying.slots.buffers import SlotBuffers
from transformers_resps.verifying.slots.engine import SlotEngine, padded_count
from transformers_resps.verifying.slots.forwards import SlotForward, packs_rows


LENGTH = 5
SLOTS = torch.tensor([[0, 2, 1, 4], [3, 1, 0, 2]])  # of each row, in any order


def parts_of(length: int, rows: int) -> list[Tensor]:
    layer = filled_cache(length, rows=rows).layers[0]
    return [layer.keys, layer.values]


def filled(buffers: SlotBuffers, length: int, rows: int, all_rows: int) -> SlotBuffers:
    parts = parts_of(length, rows)
    buffers.reserve(parts, all_rows, 16)
    buffers.fill(parts, length, [torch.arange(length)] * all_rows)
    return buffers


@pytest.fixture
def buffers() -> SlotBuffers:
    """Two rows of five entries, and a copy of the last row."""
    return filled(SlotBuffers(), LENGTH, 2, 3)


def test_entries_come_back_in_the_order_that_is_asked_for_also_from_larger_buffers(buffers: SlotBuffers) -> None:
    expected = parts_of(LENGTH, 2)
    for size in (16, 40):
        if buffers.size < size:
            buffers.grow(size)
        assert buffers.size == size
        for found, part in zip(buffers.entries(SLOTS), expected, strict=True):
            for row, slots in enumerate(SLOTS):
                assert torch.equal(found[row], part[row, :, slots])


def test_a_row_without_its_padding_begins_at_slot_0() -> None:
    buffers, parts = SlotBuffers(), parts_of(LENGTH, 2)
    buffers.reserve(parts, 2, 16)
    newest = [part[:, :, 1:] for part in parts]  # of a sliding layer, which forgot its first entry
    buffers.fill(newest, LENGTH, [torch.tensor([2, 3, 4]), torch.arange(5)])
    found = buffers.entries(torch.arange(5)[None].expand(2, -1))
    for part, expected in zip(found, parts, strict=True):
        assert torch.equal(part[0, :, :3], expected[0, :, 2:]) and not part[0, :, 3:].any()
        assert torch.equal(part[1, :, 1:], expected[1, :, 1:]) and not part[1, :, 0].any()


def test_each_rows_entries_move_in_all_parts(buffers: SlotBuffers) -> None:
    before = buffers.entries(torch.arange(LENGTH).expand(3, -1))
    buffers.move(torch.tensor([[2, 4], [1, 3], [4, 4]]), torch.tensor([[0, 1], [0, 1], [2, 2]]))
    after = buffers.entries(torch.arange(LENGTH).expand(3, -1))
    for found, part in zip(after, before, strict=True):
        assert torch.equal(found[0], part[0][:, [2, 4, 2, 3, 4]])
        assert torch.equal(found[1], part[1][:, [1, 3, 2, 3, 4]])
        assert torch.equal(found[2], part[2][:, [0, 1, 4, 3, 4]])


@pytest.mark.parametrize("rows", [[1], [1, 0, 0]], ids=["fewer", "as many"])
def test_rows_that_are_kept_keep_their_entries(buffers: SlotBuffers, rows: list[int]) -> None:
    before = buffers.entries(SLOTS[:1].expand(3, -1))
    buffers.keep_rows(rows)
    for found, expected in zip(buffers.entries(SLOTS[:1].expand(len(rows), -1)), before, strict=True):
        assert torch.equal(found, expected[rows])


def test_rows_that_are_kept_bring_no_more_than_their_texts(buffers: SlotBuffers) -> None:
    before = buffers.entries(torch.arange(LENGTH).expand(3, -1))
    buffers.keep_rows([2, 0], length=3)
    for found, expected in zip(buffers.entries(torch.arange(3).expand(2, -1)), before, strict=True):
        assert torch.equal(found, expected[[2, 0], :, :3])


@pytest.mark.parametrize("row", [None, 1])
def test_parts_are_the_same_tensors_at_every_call_and_lie_in_the_buffers(
    buffers: SlotBuffers, row: int | None
) -> None:
    parts = buffers.parts(row)
    assert all(part is again for part, again in zip(parts, buffers.parts(row), strict=True))
    assert all(part.is_contiguous() and not part._is_view() for part in parts), "as compiled code wants it"
    parts[0][:, :, 2] = -1.0
    written = buffers.entries(torch.full((3, 1), 2))[0] == -1.0
    assert written[1].all() and bool(written.all()) == (row is None)


def test_the_next_text_finds_the_same_buffers_unless_it_needs_more(buffers: SlotBuffers) -> None:
    place = buffers.parts()[0].data_ptr()
    for rows in (3, 2, 1, 3):
        filled(buffers, 3, rows, rows)
        assert buffers.parts()[0].data_ptr() == place and len(buffers.parts()[0]) == rows
    filled(buffers, 3, 4, 4)
    assert buffers.parts()[0].data_ptr() != place and len(buffers.parts()[0]) == 4


def test_the_first_rows_stay_where_they_are(buffers: SlotBuffers) -> None:
    place, before = buffers.parts()[0].data_ptr(), buffers.entries(SLOTS[:1].expand(3, -1))
    buffers.keep_rows([0, 1])
    assert buffers.parts()[0].data_ptr() == place
    for found, expected in zip(buffers.entries(SLOTS[:1].expand(2, -1)), before, strict=True):
        assert torch.equal(found, expected[:2])


def test_a_graph_serves_many_sizes_of_trees() -> None:
    counts = range(1, 257)
    captured = [padded_count(torch.device("cuda"), count) for count in counts]
    assert all(padded >= count for padded, count in zip(captured, counts, strict=True))
    assert len(set(captured)) < 12


def test_a_forward_on_a_cpu_has_four_rows_or_more_and_two_nodes_of_each_text() -> None:
    cpu = torch.device("cpu")
    assert [padded_count(cpu, count) for count in (1, 2, 4, 9)] == [4, 4, 4, 9]
    assert [padded_count(cpu, 1, rows) for rows in (1, 2, 3, 4, 8)] == [4, 2, 2, 2, 2]
    assert [padded_count(cpu, count, least=2) for count in (1, 2, 4, 9)] == [2, 2, 4, 9]


# Nodes of several rows as one

TREES = (torch.tensor([[3, 4, 5, 6, 7]] * 3), torch.tensor([[0, 0, 1, 1, 3], [0, 0, 0, 2, 3], [0, 0, 1, 2, 3]]))
SIZES = [3, 5, 1]
PACKED = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10, 10, 10])  # of rows of five, and padding


def packed_inputs(slots: int = 16) -> list[Tensor]:
    """A tree of each of three rows, which stand at different places, one after padding."""
    tree = DraftTree.from_parents(*TREES)
    roots, seen = torch.tensor([[4, 4], [6, 5], [3, 3]]), torch.ones(3, slots, dtype=torch.bool)
    seen[1, 0] = False
    return [tree.tokens, tree.depths, tree.ancestors, roots, seen]


def buffers_of(target: PreTrainedModel, pattern: Any, slots: int = 16) -> list[Tensor]:
    torch.manual_seed(2)
    parts = [part for layer in pattern.layers for part in (layer.keys, layer.values) if part is not None]
    return [torch.randn(3, part.shape[1], slots + 2, part.shape[3], dtype=target.dtype) for part in parts]


_NAMES = ("llama", "mistral-window", "qwen2-mixed-windows", "gemma3_text", "gpt2", "olmo2", "qwen3_moe")


@torch.no_grad()
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if str(one) in _NAMES], ids=str)
def test_packed_nodes_get_the_logits_and_features_that_whole_trees_get(architecture: Architecture) -> None:
    target = architecture.build("sdpa").double()
    target.config._experts_implementation = "batched_mm"  # grouped ones have no fp64 kernel
    assert packs_rows(target, is_batch=True)
    pattern, inputs = SlotEngine().pattern(target), packed_inputs()
    kept, buffers = torch.arange(5), buffers_of(target, pattern)
    packed_buffers = [part.clone() for part in buffers]
    logits, *features = SlotForward(target, pattern, [1])([*inputs, kept], buffers)
    packed, given = SlotForward(target, pattern, None, packs_rows=True), [*inputs, torch.arange(11), PACKED]
    outputs = packed(given, packed_buffers)
    found, caught = outputs[0], packed.features(outputs, given, [1])
    start = 0
    for row, size in enumerate(SIZES):
        torch.testing.assert_close(found[0, start : start + size], logits[row, :size])
        torch.testing.assert_close(caught[1][row, :size], features[0][row, :size])
        written = slice(int(inputs[3][row, 0]), int(inputs[3][row, 0]) + size)
        for mine, whole in zip(packed_buffers, buffers, strict=True):
            torch.testing.assert_close(mine[row, :, written], whole[row, :, written])
        start += size
    untouched = buffers_of(target, pattern)[0]
    assert torch.equal(packed_buffers[0][0, :, 7:], untouched[0, :, 7:]), "no other slot is written"


@torch.no_grad()
def test_nodes_that_are_not_computed_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def noted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *options: Any) -> Tensor:
        masks.append(mask)
        return attend(query, key, value, mask, *options)

    target = Architecture("llama", {"num_hidden_layers": 1}).build("sdpa")
    pattern = SlotEngine().pattern(target)
    monkeypatch.setattr("transformers_resps.verifying.attention.attend", noted)
    inputs = [*packed_inputs(), torch.arange(11), PACKED]
    SlotForward(target, pattern, [], packs_rows=True)(inputs, buffers_of(target, pattern))
    sees = (masks[0] == 0).any(-1)[:, 0]
    assert sees.tolist() == [[node < size for node in range(5)] for size in (3, 5, 1)]


def test_code_of_packed_nodes_takes_any_number_of_them() -> None:
    target = Architecture("llama", {"num_hidden_layers": 1}).build("sdpa")
    pattern, inputs = SlotEngine().pattern(target), packed_inputs()
    forward = SlotForward(target, pattern, [], packs_rows=True)
    tensors = [*inputs, torch.tensor([2, 7, 8, 8]), PACKED, *buffers_of(target, pattern)]
    check_limits(forward, tensors, fixed=".")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_chain", [False, True])
def test_code_of_the_invariant_mode_takes_blocks_paths_and_levels_of_any_number(
    rows: int, is_chain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attends_natively", lambda *states: True)  # on any processor
    target = Architecture("llama", {"num_hidden_layers": 1}).build("sdpa")
    engine, tree, roots = SlotEngine(), DraftTree.from_parents(*TREES), torch.tensor([[200], [170], [230]])
    forward = InvariantForward(Lock(), 1, target, engine.pattern(target), [])
    own = [part[:rows] for part in (tree.tokens, tree.depths, tree.ancestors, roots)]
    layout = (
        BlockLayout.of_chain(own[3], own[1], least=2)
        if is_chain
        else BlockLayout.of_tree(own[3], own[1], own[2], least=2)
    )
    positions = (own[3] + own[1])[..., None]
    tensors = [*own[:2], own[3], positions, torch.arange(2), *layout]
    tensors += [part[:rows] for part in buffers_of(target, engine.pattern(target), 270)]
    check_limits(forward, tensors, fixed=".b" if rows == 1 else ".")


def check_limits(forward: SlotForward, tensors: list[Tensor], fixed: str) -> None:
    """A size that a trace fixes would make each process compile anew, and each size."""
    sizes = [*forward.sizes, "b.s.", "b.s."]
    changing = [
        {at: torch.export.Dim.DYNAMIC for at, size in enumerate(part) if size not in fixed and tensor.shape[at]}
        for part, tensor in zip(sizes, tensors, strict=True)
    ]

    class Program(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return forward.function(*given)

    with forward.running(), torch.no_grad():
        program = torch.export.export(Program(), tuple(tensors), dynamic_shapes=(tuple(changing),), strict=False)
    *lowest, slots = sorted(int(limits.lower) for limits in program.range_constraints.values())
    assert max(lowest) <= 2 and slots <= 2 * BLOCK, "the invariant mode has two blocks or more"
    assert all(limits.upper > 2**31 for limits in program.range_constraints.values())


def test_packaged_code_runs_without_the_names_that_tracing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Packaged(AsItIs):
        def run_packaged(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], settings: Any = None) -> Any:
            return self(inputs, buffers)

    target = Architecture("llama", {"num_hidden_layers": 1}).build("sdpa")
    engine = SlotEngine()
    pattern, inputs = engine.pattern(target), [*packed_inputs(), torch.arange(5)]
    forward, buffers = SlotForward(target, pattern, []), buffers_of(target, pattern)
    expected = forward(inputs, buffers)[0]
    monkeypatch.setattr(slots_module, "CompiledFunction", Packaged)
    monkeypatch.setattr(SlotForward, "running", lambda self: pytest.fail("attention is named"))
    with engine.borrow(target):
        torch.testing.assert_close(engine.forward(forward, inputs, buffers)[0], expected)
