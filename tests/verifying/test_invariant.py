"""Attention of the invariant mode: right, and to the bit the same for a token whatever else is in the forward."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, PreTrainedModel

from tests.kernels import RestRoundsOtherwise
from tests.trees import path_of
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.invariant.attention import (
    BLOCK,
    BlockLayout,
    BlockReads,
    invariant_attention,
    levels_below,
)
from transformers_resps.verifying.invariant.row_classes import RowClasses
from transformers_resps.verifying.masks import AttentionPattern


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
META_SIZES = (6, 3, 24), (2, 256, 24), (2, 256, 16)  # queries, keys and values
BORDERS = [place + step for place in (32, 64, 96, 128, 160, 512) for step in (-1, 0, 1)]
STALE = 30.0  # what a slot holds that is of no text: large beside the others


@dataclass(frozen=True)
class Heads:
    """Of one layer."""

    count: int
    kv: int
    size: int
    value_size: int


HEADS = [Heads(4, 4, 16, 16), Heads(4, 2, 64, 64), Heads(6, 2, 16, 16), Heads(8, 1, 64, 64), Heads(4, 2, 24, 16)]


def any_tree(random: Random, count: int, kind: str) -> list[int]:
    """The parents of so many nodes."""
    if kind == "chain":
        return [0, *range(count - 1)]
    if kind == "star":
        return [0] * count
    return [0, *(random.choice([max(node - 1 - node % 2, 0), random.randrange(node)]) for node in range(1, count))]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """Texts that end in the nodes of a tree: queries, keys and values `[places or nodes, heads, hd]` of each row."""

    def __init__(self, heads: Heads, roots: list[int], parents: list[int], dtype: torch.dtype, seed: int) -> None:
        self.heads, self.roots, self.parents, self.dtype, self.seed = heads, roots, parents, dtype, seed
        rows, count, longest = len(roots), len(parents), max(roots)
        self.queries = drawn(seed, rows, count, heads.count, heads.size, dtype=dtype)
        kinds = (heads.size, heads.value_size)
        self.text = [drawn(seed + 1 + at, rows, longest, heads.kv, size, dtype=dtype) for at, size in enumerate(kinds)]
        self.nodes = [drawn(seed + 3 + at, rows, count, heads.kv, size, dtype=dtype) for at, size in enumerate(kinds)]
        self.sinks = drawn(seed + 5, heads.count, dtype=dtype)

    def text_of(self, row: int, node: int) -> list[Tensor]:
        """Keys and values of a node's text, its own included: `[s, kv heads, hd]`."""
        path = path_of(self.parents, node)
        pairs = zip(self.text, self.nodes, strict=True)
        return [torch.cat([text[row, : self.roots[row]], nodes[row, path]]) for text, nodes in pairs]

    def tree(
        self, stale: float = STALE, is_compiled: bool = False, layout: BlockLayout | None = None, **options: Any
    ) -> Tensor:
        """What all nodes get in one forward, `[b, n, heads, hd]`, also of the sizes that compiled code takes."""
        tree, roots = self.drafted, torch.tensor(self.roots)[:, None]
        layout = layout or BlockLayout.of_tree(roots, tree.depths, tree.ancestors, least=2 if is_compiled else 0)
        buffers = self.buffers(stale)
        return attend(layout, roots + tree.depths, self.queries, buffers, **self.options(**options))

    @property
    def drafted(self) -> DraftTree:
        parents = torch.tensor([self.parents] * len(self.roots))
        return DraftTree.from_parents(torch.zeros_like(parents), parents)

    def buffers(self, stale: float = STALE) -> list[Tensor]:
        """Keys and values of text and nodes, in their slots."""
        rows, size = len(self.roots), max(self.roots) + len(self.parents)
        buffers = buffers_of(self.heads, size, rows, self.dtype, stale)
        for row, root in enumerate(self.roots):
            for buffer, text, nodes in zip(buffers, self.text, self.nodes, strict=True):
                put(buffer, row, 0, text[row, :root])
                put(buffer, row, root, nodes[row])
        return buffers

    def in_parts(self, step: int) -> Tensor:
        """As `tree` of the first row, which so many nodes at a time are read of, `[n, heads, hd]`: of fixed sizes."""
        parents, root = torch.tensor([self.parents]), self.roots[0]
        tree, places = DraftTree.from_parents(torch.zeros_like(parents), parents), torch.tensor([[root]])
        blocks = 1 << ((root + len(self.parents)) // BLOCK).bit_length()
        buffers, found = buffers_of(self.heads, blocks * BLOCK, 1, self.dtype, STALE), []
        for buffer, text in zip(buffers, self.text, strict=True):
            put(buffer, 0, 0, text[0, :root])
        for stop in range(step, len(self.parents) + 1, step):
            own, sizes = slice(stop - step, stop), (step, blocks, levels_below(root, tree.level_count))
            for buffer, nodes in zip(buffers, self.nodes, strict=True):
                put(buffer, 0, root + own.start, nodes[0, own])
            layout = BlockLayout.of_sizes(places, tree.depths[:, :stop], tree.ancestors[:, :stop, :stop], *sizes)
            asking = (places + tree.depths)[:, own], self.queries[:1, own]
            found.append(attend(layout, *asking, buffers, window=None, sinks=None)[0])
        return torch.cat(found)

    def alone(self, row: int, node: int, **options: Any) -> Tensor:
        """What a node gets as the newest token of its text, `[heads, hd]`."""
        entries = self.text_of(row, node)
        place = torch.tensor([[len(entries[0]) - 1]])
        layout = BlockLayout.of_chain(place, torch.zeros_like(place))
        buffers = buffers_of(self.heads, layout.shared.numel(), 1, self.dtype, STALE)
        for buffer, text in zip(buffers, entries, strict=True):
            put(buffer, 0, 0, text)
        query = self.queries[row, node][None, None]
        return attend(layout, place, query, buffers, **self.options(**options))[0, 0]

    def expected(self, row: int, node: int, window: int | None = None, sinks: bool = False) -> Tensor:
        """The same by a softmax in float64."""
        keys, values = (part.double()[-(window or len(part)) :] for part in self.text_of(row, node))
        sharing = self.heads.count // self.heads.kv
        found = []
        for head, query in enumerate(self.queries[row, node].double()):
            scores = keys[:, head // sharing] @ query * self.heads.size**-0.5
            if sinks:
                scores = torch.cat([scores, self.sinks[head].double()[None]])
            found.append(scores.softmax(0)[: len(keys)] @ values[:, head // sharing])
        return torch.stack(found)

    def options(self, window: int | None = None, sinks: bool = False) -> dict[str, Any]:
        return {"window": window, "sinks": self.sinks if sinks else None}


def buffers_of(heads: Heads, size: int, rows: int, dtype: torch.dtype, stale: float) -> list[Tensor]:
    """Keys and values `[b, kv heads, slots, hd]`: so many slots, and two blocks after them."""
    found = [torch.full((rows, heads.kv, size + 2 * BLOCK, width), stale) for width in (heads.size, heads.value_size)]
    if not torch.isfinite(torch.tensor(stale)):
        for buffer in found:
            buffer[:, :, :size] = 0
    return [buffer.to(dtype) for buffer in found]


def put(buffer: Tensor, row: int, first: int, entries: Tensor) -> None:
    """Write entries `[s, kv heads, hd]` to a row's slots from the `first` on."""
    buffer[row, :, first : first + len(entries)] = entries.transpose(0, 1)


def attend(
    layout: BlockLayout,
    places: Tensor,
    queries: Tensor,
    buffers: list[Tensor],
    *,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    reads = BlockReads(layout, places, queries.dtype)
    keys, values = buffers
    module, mask = Module(), reads.mask(AttentionPattern(window))
    return invariant_attention(module, queries.transpose(1, 2), keys, values, mask, resps_reads=reads, s_aux=sinks)[0]


def some_nodes(random: Random, parents: list[int]) -> Iterator[int]:
    """The root, the last and the deepest node, and two others."""
    deepest = max(range(len(parents)), key=lambda node: len(path_of(parents, node)))
    yield from {0, len(parents) - 1, deepest, random.randrange(len(parents)), random.randrange(len(parents))}


@cache
def rounds_alone(heads: Heads, dtype: torch.dtype) -> bool:
    """Whether the product lets a lone row attend here: other kernels need rows beside it, or are refused."""
    target: Any = Module()
    sizes = {"num_attention_heads": heads.count, "num_key_value_heads": heads.kv, "head_dim": heads.size}
    target.config = LlamaConfig(hidden_size=heads.count * heads.size, **sizes)
    target.dtype, target.device = dtype, torch.device("cpu")
    try:
        return RowClasses().needs(cast(PreTrainedModel, target)).forward == 1
    except ValueError:
        return False


def check(case: Case, random: Random, **options: Any) -> None:
    """Right, and to the bit what a node gets alone."""
    found = case.tree(**options)
    alone = {name: value for name, value in options.items() if name != "is_compiled"}
    for row in range(len(case.roots)):
        for node in some_nodes(random, case.parents):
            place = f"{case.heads}, {case.dtype}, roots {case.roots}, node {node} of {case.parents}, {options}"
            expected, error = case.expected(row, node, **alone), TOLERANCE[case.dtype]
            torch.testing.assert_close(found[row, node].double(), expected, rtol=error, atol=error, msg=place)
            if rounds_alone(case.heads, case.dtype):
                assert torch.equal(found[row, node], case.alone(row, node, **alone)), place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_node_gets_the_bits_of_the_same_token_alone_at_every_border(dtype: torch.dtype) -> None:
    random = Random(1)
    for seed, root in enumerate([0, 1, *BORDERS]):
        parents = any_tree(random, random.randint(1, 40), random.choice(["any", "any", "chain", "star"]))
        check(Case(random.choice(HEADS), [root], parents, dtype, seed), random)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rows_that_begin_anywhere_get_the_bits_of_each_text_alone(heads: Heads) -> None:
    """The longer ones lend the others blocks that these do not see."""
    random = Random(2)
    for seed, dtype in enumerate(DTYPES):
        roots = [*random.sample([0, 3, *BORDERS], 2), random.choice(BORDERS[-3:])]
        check(Case(heads, roots, any_tree(random, 12, "any"), dtype, seed), random, is_compiled=seed % 2 == 0)


@pytest.mark.parametrize("window", [1, 5, 31, 32, 33, 64, 100, 128, 300, 1000])
def test_a_sliding_layer_shows_a_node_the_end_of_its_own_text(window: int) -> None:
    """Inside the tail, in the middle of a block, across two, and longer than the text."""
    random = Random(window)
    for seed, root in enumerate([0, 30, 63, 127, 161, 290]):
        parents = any_tree(random, random.randint(1, 40), "any")
        case = Case(random.choice(HEADS), [root, root // 2], parents, random.choice(DTYPES), seed)
        check(case, random, window=window, sinks=seed % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sink_takes_its_share_of_each_text(dtype: torch.dtype) -> None:
    random = Random(4)
    for seed, root in enumerate([0, 20, 95, 200]):
        check(Case(random.choice(HEADS), [root], any_tree(random, 9, "any"), dtype, seed), random, sinks=True)


@pytest.mark.parametrize("count", [*range(1, 9), 31, 32, 33, 34, 35, 36, 63, 64, 65])
def test_no_number_of_query_rows_changes_a_bit(count: int) -> None:
    """A kernel groups its rows by 4, 32, 64 and more."""
    random = Random(count)
    for seed, heads in enumerate([Heads(2, 2, 16, 16), Heads(3, 1, 16, 16), Heads(8, 1, 64, 64)]):
        parents = any_tree(random, count, "any")
        check(Case(heads, [random.choice([130, 300])], parents, DTYPES[seed - count % 3], count), random)


@pytest.mark.parametrize("heads", [*HEADS[:4], Heads(3, 1, 16, 16), Heads(14, 2, 16, 16)], ids=str)
def test_a_kernel_is_asked_for_no_rest_of_fewer_than_eight_rows(heads: Heads) -> None:
    """MKL's kernels for processors without AVX2 multiply it in another order."""
    random = Random(9)
    for count in (1, 2, 3, 9, 11, 33):
        for root in (5, 60, 130):
            case = Case(heads, [root, root // 2], any_tree(random, count, "any"), torch.float32, count)
            with RestRoundsOtherwise(8):
                found, alone = case.tree(), case.alone(0, count - 1)
            assert torch.equal(found, case.queries) and torch.equal(alone, case.queries[0, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [Heads(8, 1, 64, 64), Heads(4, 4, 16, 16)], ids=str)
def test_a_prompt_gets_the_bits_of_its_tokens_one_by_one(dtype: torch.dtype, heads: Heads) -> None:
    random = Random(5)
    for root, count in ((0, 128), (128, 128), (77, 100)):
        check(Case(heads, [root], any_tree(random, count, "chain"), dtype, root), random)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["chain", "star", "any"])
def test_a_tree_read_in_parts_of_one_size_gives_each_node_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """As on a GPU, where nothing is read of the tree before its forwards: its blocks are counted from above."""
    random = Random(8)
    for seed, root in enumerate([0, 33, 63, 120, 200]):
        case = Case(random.choice(HEADS), [root], any_tree(random, 24, kind), dtype, seed)
        found = case.in_parts(8)
        if not rounds_alone(case.heads, dtype):
            continue
        for node in some_nodes(random, case.parents):
            assert torch.equal(found[node], case.alone(0, node)), (case.heads, root, node, case.parents)


def test_a_score_of_any_size_is_right() -> None:
    """One key of the tail or of a block outweighs all others: exp overflows where nothing is taken off."""
    for place in (3, 140, 170):
        case = Case(HEADS[0], [171], [0, 0], torch.float32, place)
        case.text[0][:, place] = 200 * case.queries[0, 0]
        check(case, Random(place))


# What lies in slots of no text


def test_what_other_texts_left_in_a_slot_changes_no_bit() -> None:
    """Any finite number: a buffer begins with zeros, and what was kept of an earlier text stays."""
    random = Random(6)
    for root in (0, 33, 100, 161, 300):
        case = Case(HEADS[1], [root, root // 3], any_tree(random, 11, "any"), torch.bfloat16, root)
        zeros, *others = (case.tree(stale, is_compiled=True) for stale in (0.0, -STALE, 1e4))
        assert all(torch.equal(zeros, other) for other in others)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("root", [0, 31, 45, 130, 161, 300])
def test_slots_after_the_blocks_of_the_tree_are_not_read(root: int, value: float) -> None:
    case = Case(HEADS[1], [root], any_tree(Random(7), 11, "any"), torch.bfloat16, root)
    assert torch.equal(case.tree(value), case.tree())


# What a layout says


def test_each_path_of_a_tree_asks_its_own_block_after_the_last_border() -> None:
    """A root at 66 and three nodes, of which the last is a child of the first, and one of padding: by hand."""
    tree = DraftTree.from_parents(torch.tensor([[7, 8, 9, 5]]), torch.tensor([[0, 0, 0, 1]])).padded(5)
    layout = BlockLayout.of_tree(torch.tensor([[66]]), tree.depths, tree.ancestors)
    assert layout.shared.tolist() == [list(range(64))] and layout.ends.tolist() == [[64] * 5]
    assert layout.groups.tolist() == [[[0, 2, 0, 0], [1, 3, 0, 0]]]  # node 2 is the first leaf
    assert layout.places.tolist() == [[[66, 67, -1, -1], [67, 68, -1, -1]]]
    assert layout.starts.tolist() == [[64, 64]]
    assert [slots[:5] for slots in layout.slots[0].tolist()] == [[64, 65, 66, 68, 66], [64, 65, 66, 67, 69]]
    assert layout.asked.tolist() == [[[0, 4, 1, 5, -1]]]


def test_a_node_after_the_next_border_asks_two_blocks_of_its_path() -> None:
    """A root at 62 and a chain of three nodes: one block of it and its child, and one of the last node."""
    ancestors = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    layout = BlockLayout.of_tree(torch.tensor([[62]]), torch.arange(3)[None], ancestors)
    assert layout.shared.numel() == 0 and layout.starts.tolist() == [[0, 64]]
    assert layout.groups.tolist() == [[[0, 1, 2, 0], [2, 0, 0, 0]]]
    assert layout.asked.tolist() == [[[0, 1, 2]], [[-1, -1, 4]]]
    assert layout.slots[0, 0].tolist() == list(range(64)) and layout.slots[0, 1, 0] == 64


def test_the_last_nodes_of_a_tree_ask_blocks_of_fixed_sizes() -> None:
    """A root at 66 and four nodes, of which the last two ask: one on each of two paths."""
    parents = torch.tensor([[0, 0, 0, 1]])
    tree = DraftTree.from_parents(torch.zeros_like(parents), parents)
    sizes = {"asking": 2, "blocks": 4, "levels": levels_below(66, 2)}
    layout = BlockLayout.of_sizes(torch.tensor([[66]]), tree.depths, tree.ancestors, **sizes)
    assert layout.shared.flatten().tolist() == list(range(256)) and layout.ends.tolist() == [[64, 64]]
    assert layout.groups.tolist() == [[[0, 0, 0, 0], [1, 0, 0, 0]]] and layout.asked.tolist() == [[[0, 4]]]
    assert layout.places.tolist() == [[[67, -1, -1, -1], [68, -1, -1, -1]]]
    assert [slots[:5] for slots in layout.slots[0].tolist()] == [[64, 65, 66, 68, 66], [64, 65, 66, 67, 69]]


@pytest.mark.parametrize(("place", "depth", "blocks"), [(0, 0, 1), (63, 0, 1), (63, 1, 2), (64, 63, 1), (70, 140, 3)])
def test_the_blocks_below_a_root_are_counted_by_hand(place: int, depth: int, blocks: int) -> None:
    assert levels_below(place, depth) == blocks


def test_a_kernel_of_a_gpu_gets_what_it_takes() -> None:
    """On the meta device, where PyTorch checks shapes: with heads that share keys, and values narrower than keys."""
    layout = BlockLayout.of_chain(torch.tensor([[70]]), torch.arange(3)[None])
    reads = BlockReads(
        BlockLayout(*(part.to("meta") for part in layout)), torch.zeros(1, 3, device="meta"), torch.bfloat16
    )
    query, key, value = (torch.empty(1, *sizes, device="meta", dtype=torch.bfloat16) for sizes in META_SIZES)
    mask = reads.mask(AttentionPattern())
    found, _ = invariant_attention(Module(), query, key, value, mask, resps_reads=reads)
    assert found.shape == (1, 3, 6, 16) and found.device.type == "meta"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_kernel_turns_what_is_hidden_into_an_infinite_score(dtype: torch.dtype) -> None:
    """Those of a GPU multiply by log2(e), and give a row whose scores are all infinite the log-sum-exp 0."""
    layout = BlockLayout.of_chain(torch.tensor([[70]]), torch.arange(3)[None])
    mask = BlockReads(layout, torch.arange(70, 73)[None], dtype).mask(AttentionPattern())
    assert mask.min() < -3e4 and (mask.float() / math.log(2)).isfinite().all()


@pytest.mark.parametrize("root", [0, 1, 100, 130, 179])
@pytest.mark.parametrize("asking", [1, 2, 5, 8])
def test_nodes_of_padding_ask_nothing_and_change_no_bit(root: int, asking: int) -> None:
    """The first nodes get what they get beside the others, which get the last one's."""
    parents = any_tree(Random(asking), 8, "any")
    case = Case(HEADS[1], [root, root // 2], parents, torch.bfloat16, asking)
    tree = DraftTree.from_parents(torch.zeros(1, 8, dtype=torch.long), torch.tensor([parents]))
    nodes = (part.expand(2, *part.shape[1:]) for part in (tree.depths, tree.ancestors))
    layout = BlockLayout.of_tree(torch.tensor(case.roots)[:, None], *nodes).of_nodes(asking)
    found = case.tree(layout=layout)
    assert torch.equal(found[:, :asking], case.tree()[:, :asking])
    assert all(torch.equal(found[:, node], found[:, asking - 1]) for node in range(asking, 8))


def test_the_fewest_parts_of_a_layout_are_filled_up_for_compiled_code() -> None:
    """Sizes of none and one are compiled apart: a root at 3 has no block before it, one group and one level."""
    root, node, ancestors = torch.tensor([[3]]), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 1).bool()
    sizes = [
        (len(found.shared), found.groups.shape[1], len(found.asked))
        for found in (BlockLayout.of_tree(root, node, ancestors, least) for least in (0, 2))
    ]
    assert sizes == [(0, 1, 1), (2, 2, 2)]


def test_a_chain_is_read_where_it_lies() -> None:
    layout = BlockLayout.of_chain(torch.tensor([[70]]), torch.arange(3)[None])
    assert layout.shared.flatten().tolist() == list(range(128)) and layout.ends.tolist() == [[71, 72, 73]]
    assert not layout.groups.numel()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_lone_root_is_read_where_it_lies_beside_its_padding(heads: Heads) -> None:
    """Its heads lie one after another, so its rows are not copied; heads of the padding fill them up."""
    case = Case(heads, [130], [0] * 4, torch.bfloat16, 3)
    layout = BlockLayout.of_chain(torch.tensor([[130]]), torch.zeros(1, 4, dtype=torch.long)).of_nodes(1)
    found = case.tree(layout=layout)[0]
    assert torch.equal(found, case.alone(0, 0).expand_as(found))
