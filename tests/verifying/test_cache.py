"""Keeping the accepted nodes: the compacted cache is a fresh prefill of the accepted text, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tests.targets import ARCHITECTURES, Architecture
from tests.trees import parents, path_of
from tests.verifying.filled_cache import filled_cache
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.cache import compact, compact_ragged, keep_rows
from transformers_resps.verifying.masks import tree_attention_mask, tree_positions


PROMPTS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11], [9, 1, 2, 6, 6, 8, 2, 10, 3]])
PATHS = torch.tensor([[0, 2, 4], [0, 1, 3]])  # one row keeps another path than the other


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.attention[0] == "sdpa"], ids=str)
def test_a_compacted_cache_equals_a_fresh_prefill(architecture: Architecture) -> None:
    target = architecture.build("sdpa")
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    options = {"use_cache": True, CACHE_KEYWORD: cache}
    parents = torch.tensor([[0, 0, 0, 1, 2, 2]] * 2)
    tree = DraftTree.from_parents(torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]), parents)
    with torch.no_grad():
        target(input_ids=PROMPTS, **options)
        cache.crop(0)
        mask = tree_attention_mask(target.config, cache, None, tree, target.dtype)
        positions = tree_positions(tree, 9)
        target(input_ids=tree.tokens, attention_mask=mask, position_ids=positions, **options)
        compact(cache, PATHS, tree.node_count)
        text = torch.cat([PROMPTS, tree.tokens.gather(1, PATHS)], dim=1)
        fresh = DynamicCache(config=target.config)
        target(input_ids=text, use_cache=True, **{CACHE_KEYWORD: fresh})
    assert cache.get_seq_length() == fresh.get_seq_length() == 12
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        if getattr(theirs, "keys", None) is not None:
            kept = theirs.keys.shape[-2]
            torch.testing.assert_close(ours.keys[..., -kept:, :], theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values[..., -kept:, :], theirs.values, atol=1e-4, rtol=1e-4)


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


def test_sliding_layers_hold_the_last_entries_of_every_row() -> None:
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=5))
    cache.activate_past_recording()
    states = torch.arange(2 * 6).view(2, 1, 6, 1).float()  # six entries in each row, of which a window shows four
    cache.update(states, states, 0)
    cache.crop(0)
    nodes = torch.tensor([[20.0, 21, 22], [30, 31, 32]])[:, None, :, None]
    cache.update(nodes, nodes, 0)
    compact_ragged(cache, torch.tensor([[0, 2], [0, 0]]), 3, torch.tensor([[6, 7], [6, 6]]), 8)
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[4, 5, 20, 22], [9, 10, 11, 30]]
    assert cache.get_seq_length() == 8
    keep_rows(cache, [1], 7)
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[9, 10, 11, 30]]
    assert cache.get_seq_length() == 7


def test_accepted_nodes_are_placed_after_each_rows_own_entries() -> None:
    cache = DynamicCache()
    states = torch.arange(2 * 7).view(2, 1, 7, 1).float()  # three entries and a tree of four nodes in each row
    cache.update(states.clone(), states.clone(), 0)
    compact_ragged(cache, torch.tensor([[0, 2], [0, 0]]), 4, torch.tensor([[3, 4], [2, 2]]), 5)
    kept = cache.layers[0].keys[:, 0, :, 0].tolist()
    assert kept == [[0, 1, 2, 3, 5], [7, 8, 10, 10, 11]], "row 1 had two entries; what is after its third is hidden"
