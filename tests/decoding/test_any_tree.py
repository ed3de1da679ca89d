"""Thousands of random trees against brute force."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MistralConfig,
    PretrainedConfig,
    StoppingCriteriaList,
)

from transformers_resps.decoding.acceptance import accept
from transformers_resps.decoding.text import Text
from transformers_resps.target.attention import tree_attention_mask, tree_positions
from transformers_resps.target.tree_cache import compact
from transformers_resps.tree import CandidatePool, DraftTree

from .trees import VOCABULARY, parents, path_of, pools, texts_of, trees


ROOT = torch.tensor([0])


def text_of_length(length: int, rows: int = 1) -> Text:
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    return Text(
        torch.zeros(rows, 1, dtype=torch.long), LogitsProcessorList(), criteria, do_sample=False, pad_token=None
    )


def brute_force_walk(tree: DraftTree, picks: list[int], most: int) -> list[int]:
    """Descend to the first child that carries the pick, until there is none or `most` tokens are written."""
    above, tokens, path = tree.parents[0].tolist(), tree.tokens[0].tolist(), [0]
    while len(path) < most:
        below = [node for node in range(1, len(tokens)) if above[node] == path[-1] and tokens[node] == picks[path[-1]]]
        if not below:
            break
        path.append(below[0])
    return path


@settings(max_examples=800)
@given(trees(), st.data())
def test_acceptance_is_the_brute_force_walk(tree: DraftTree, data: st.DataObject) -> None:
    count = tree.node_count
    picks = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count))
    most = data.draw(st.integers(1, 6))
    text = text_of_length(1 + most)
    acceptance = accept(tree, torch.nn.functional.one_hot(torch.tensor([picks]), VOCABULARY).float(), text)
    path = brute_force_walk(tree, picks, most)
    assert acceptance.path[0].tolist() == path
    assert acceptance.tokens[0].tolist() == [picks[node] for node in path]
    assert text.input_ids[0].tolist() == [0] + [picks[node] for node in path]
    assert [int(count) for count in acceptance.emitted] == [len(path)]
    assert text.finished == (len(path) == most)


@settings(max_examples=300)
@given(st.lists(trees(6), min_size=2, max_size=3), st.data())
def test_rows_commit_what_the_shortest_run_allows(alone: list[DraftTree], data: st.DataObject) -> None:
    count = min(tree.node_count for tree in alone)
    tree = DraftTree.from_parents(
        torch.cat([row.tokens[:, :count] for row in alone]), torch.cat([row.parents[:, :count] for row in alone])
    )
    picks = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count)) for _ in alone]
    acceptance = accept(
        tree, torch.nn.functional.one_hot(torch.tensor(picks), VOCABULARY).float(), text_of_length(99, len(alone))
    )
    rows = [DraftTree.from_parents(tree.tokens[row, None], tree.parents[row, None]) for row in range(len(alone))]
    paths = [brute_force_walk(row, picks[index], 99) for index, row in enumerate(rows)]
    shortest = min(map(len, paths))
    assert acceptance.path.tolist() == [path[:shortest] for path in paths]


@settings(max_examples=500)
@given(pools(), st.integers(2, 30))
def test_a_tree_keeps_the_best_of_a_pool_and_orphans_nobody(pool: CandidatePool, total_tokens: int) -> None:
    tree = DraftTree.from_pool(ROOT, pool, total_tokens)
    scores, above = pool.scores[0].tolist(), pool.parents[0].tolist()
    best = sorted(sorted(range(len(scores)), key=lambda node: (-scores[node], node))[: total_tokens - 1])
    order = [-1, *best]
    assert tree.node_count == len(order)
    assert tree.tokens[0].tolist() == [0] + pool.tokens[0, best].tolist()
    assert [order[parent] for parent in tree.parents[0].tolist()[1:]] == [above[node] for node in best]
    assert tree.scores[0].tolist() == [0.0] + [scores[node] for node in best]
    assert tree.depths[0].tolist() == [0] + pool.levels[best].tolist()


@settings(max_examples=500)
@given(trees(), st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
def test_a_merged_chain_adds_its_texts_and_nothing_else(tree: DraftTree, chain: list[int]) -> None:
    merged = tree.with_chains([chain])
    count = tree.node_count
    assert texts_of(merged) == texts_of(tree) | {tuple(chain[:length]) for length in range(len(chain) + 1)}
    assert torch.equal(merged.tokens[:, :count], tree.tokens) and torch.equal(merged.parents[:, :count], tree.parents)
    assert merged.node_count - count <= len(chain)
    rebuilt = DraftTree.from_parents(merged.tokens, merged.parents)
    assert torch.equal(merged.ancestors, rebuilt.ancestors) and torch.equal(merged.depths, rebuilt.depths)
    assert merged.scores.shape == merged.tokens.shape


@settings(max_examples=300)
@given(st.lists(trees(6), min_size=2, max_size=3), st.data())
def test_chains_of_different_lengths_never_change_what_another_row_can_read(
    alone: list[DraftTree], data: st.DataObject
) -> None:
    count = min(tree.node_count for tree in alone)
    tree = DraftTree.from_parents(
        torch.cat([row.tokens[:, :count] for row in alone]), torch.cat([row.parents[:, :count] for row in alone])
    )
    chains = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5)) for _ in alone]
    merged = tree.with_chains(chains)
    for row, chain in enumerate(chains):
        expected = texts_of(tree, row) | {tuple(chain[:length]) for length in range(len(chain) + 1)}
        filled = texts_of(merged, row) - expected
        assert all(len(text) == 1 for text in filled), "a row is filled up with children of the root"
        assert not filled or len(merged.tokens[row]) > count and not texts_of(tree, row) - {()}


@settings(max_examples=300)
@given(trees(), st.integers(0, 9), st.integers(0, 3))
def test_a_node_sees_the_prefix_and_its_own_path(tree: DraftTree, past: int, pads: int) -> None:
    cache = filled_cache(past)
    prefix_mask = torch.tensor([[int(slot >= pads) for slot in range(past)]]) if pads else None
    config = LlamaConfig(num_hidden_layers=1)
    mask = tree_attention_mask(config, cache, prefix_mask, tree, torch.float32)
    assert isinstance(mask, torch.Tensor)
    row = tree.parents[0].tolist()
    for node in range(tree.node_count):
        path = path_of(row, node)
        seen = [slot for slot in range(past) if slot >= pads] + [past + other for other in sorted(path)]
        assert (mask[0, 0, node] == 0).nonzero().flatten().tolist() == seen
        assert int(tree_positions(tree, torch.tensor([past]))[0, node]) == past + len(path) - 1
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == sorted(path)


@settings(max_examples=300)
@given(trees(), st.integers(1, 9), st.integers(2, 8))
def test_a_sliding_layer_shows_the_end_of_a_nodes_own_text(tree: DraftTree, past: int, window: int) -> None:
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    cache = filled_cache(past, config=config)
    cache.crop(0)
    mask = tree_attention_mask(config, cache, None, tree, torch.float32)
    assert isinstance(mask, torch.Tensor)
    visible = mask.shape[-1] - tree.node_count
    slots = [*range(past - visible, past), *(past + depth for depth in tree.depths[0].tolist())]
    for node in range(tree.node_count):
        own = {*range(visible), *(visible + other for other in path_of(tree.parents[0].tolist(), node))}
        seen = [key for key in sorted(own) if slots[key] > slots[visible + node] - window]
        assert (mask[0, 0, node] == 0).nonzero().flatten().tolist() == seen
        assert len(seen) == min(window, slots[visible + node] + 1)


@settings(max_examples=300)
@given(st.lists(parents(), min_size=1, max_size=3), st.integers(0, 6), st.data())
def test_the_cache_keeps_the_accepted_path_and_forgets_the_rest(
    rows: list[list[int]], past: int, data: st.DataObject
) -> None:
    count = min(map(len, rows))
    paths = [path_of(row[:count], data.draw(st.integers(0, count - 1))) for row in rows]
    shortest = min(map(len, paths))
    paths = [path[:shortest] for path in paths]
    cache = filled_cache(past + count, len(rows))
    before = cache.layers[0].keys.clone()
    compact(cache, torch.tensor(paths), count)
    assert cache.get_seq_length() == past + shortest
    for row, path in enumerate(paths):
        slots = [*range(past), *(past + node for node in path)]
        assert torch.equal(cache.layers[0].keys[row], before[row, :, slots])
        assert torch.equal(cache.layers[0].values[row], -before[row, :, slots])


def filled_cache(length: int, rows: int = 1, config: PretrainedConfig | None = None) -> DynamicCache:
    """Every entry is its own: row, head, slot."""
    cache = DynamicCache(config=config or LlamaConfig(num_hidden_layers=1))
    cache.activate_past_recording()
    if length:
        keys = torch.arange(rows * 2 * length * 3, dtype=torch.float32).reshape(rows, 2, length, 3) + 1
        cache.update(keys, -keys, 0)
    return cache


@pytest.mark.parametrize("batch_size", [1, 3])
@settings(max_examples=200)
@given(st.data())
def test_a_child_is_the_first_that_carries_the_token(batch_size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    rows = [data.draw(trees(8).filter(lambda tree: tree.node_count >= count)) for _ in range(batch_size)]
    tree = DraftTree.from_parents(
        torch.cat([row.tokens[:, :count] for row in rows]), torch.cat([row.parents[:, :count] for row in rows])
    )
    for row, found in enumerate(tree.children()):
        above, own = tree.parents[row].tolist(), tree.tokens[row].tolist()
        for at in product(range(count), range(VOCABULARY)):
            below = [node for node in range(1, count) if (above[node], own[node]) == at]
            assert found.get(at) == (below[0] if below else None)
