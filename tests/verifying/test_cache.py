"""Keeping the accepted nodes: the compacted cache is a fresh prefill of the accepted text, row by row."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.targets import ARCHITECTURES, Architecture
from tests.trees import parents, path_of
from tests.verifying.filled_cache import filled_cache
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.cache import (
    PreallocatedLayer,
    compact,
    compact_ragged,
    entries_of,
    keep_rows,
    preallocate,
    restore_stock_layers,
)
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


# A layer that grows in place holds what a stock one holds, whatever is done to both.
def filled(count: int = 5, layers: int = 1) -> DynamicCache:
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for index in range(layers):
        cache.update(*torch.randn(2, 3, 2, count, 4, generator=generator), index)
    return cache


def change(cache: DynamicCache, what: str, path: Tensor) -> None:
    if what == "crop":
        cache.crop(-2)
    if what == "select" and len(path) > 1:
        cache.batch_select_indices(torch.arange(len(path) - 1, 0, -1))
    if what == "write":
        cache.layers[0].keys[:, :, -1:] = 1.5
    if what == "keep":
        compact(cache, path, 5)


@pytest.mark.parametrize("seed", range(8))
def test_it_holds_what_a_stock_layer_holds(seed: int) -> None:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    stock, preallocated = filled(layers=11), filled(layers=11)
    preallocate(preallocated)
    for _ in range(60):
        layer: Any = stock.layers[0]
        rows, length = layer.keys.shape[0], layer.get_seq_length()
        what = chance.choice(["update", "update", "crop", "select", "write", "keep"])
        if what == "update":
            count = chance.choice([1, 7, 200, 700])
            for index in range(11):
                states = torch.randn(2, rows, 2, count, 4, generator=generator)
                for found, expected in zip(
                    preallocated.update(*states, index), stock.update(*states, index), strict=True
                ):
                    assert torch.equal(found, expected)
        path = torch.tensor([[0, *sorted(chance.sample(range(1, 5), 2))] for _ in range(rows)])
        for cache in (stock, preallocated):
            if what != "update" and length > 5:
                change(cache, what, path)
        for found, expected in zip(preallocated.layers, stock.layers, strict=True):
            assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)
        assert preallocated.get_seq_length() == stock.get_seq_length()


def test_the_past_is_copied_once_in_256_positions() -> None:
    cache = filled()
    preallocate(cache)
    places = set()
    for _ in range(500):
        cache.update(*torch.zeros(2, 3, 2, 2, 4), 0)
        places.add(cache.layers[0].keys.data_ptr())
        cache.crop(-1)
    assert len(places) <= 3


def test_few_tensors_hold_the_entries_of_all_layers_also_after_they_moved() -> None:
    cache = filled(layers=11)
    cache.layers[3].values = cache.layers[3].values[..., :2]  # as where values have fewer numbers than keys
    preallocate(cache)
    assert [len(part) for part in entries_of(cache.layers)] == [8, 8, 1, 1, 2, 2]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert [part.shape[:2] for part in entries_of(cache.layers)] == [(1, 2)] * 22
    for index in range(11):
        cache.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 2 if index == 3 else 4), index)
    assert [len(part) for part in entries_of(cache.layers)] == [8, 8, 1, 1, 2, 2]


def test_only_filled_layers_with_full_attention_change_and_all_become_stock_again() -> None:
    cache = filled()
    cache.layers += [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]
    kinds = [type(layer) for layer in cache.layers]
    preallocate(cache)
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer, *kinds[1:]]
    cache.update(*torch.zeros(2, 3, 2, 2, 4), 0)
    restore_stock_layers(cache)
    assert [type(layer) for layer in cache.layers] == kinds
    assert set(vars(cache.layers[0])) == set(vars(filled().layers[0])) | {"dtype"}  # which releases before 5.24 read


def test_a_call_hands_back_stock_layers_also_when_it_fails(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, Tensor]
) -> None:
    class Failing(FixedPolicy):
        def observe(self, record: object) -> None:
            raise ZeroDivisionError

    target: Any = attach(tiny_target)
    one_row = {name: value[:1] for name, value in prompt.items()}
    for policy, error in ((FixedPolicy(TreeShape(5, 2, 2)), None), (Failing(TreeShape(5, 2, 2)), ZeroDivisionError)):
        cache: Any = DynamicCache(config=target.config)
        options: Any = {"assistant_model": tiny_head, "policy": policy, CACHE_KEYWORD: cache, "max_new_tokens": 9}
        if error is None:
            target.generate(**one_row, **options)
        else:
            with pytest.raises(error):
                target.generate(**one_row, **options)
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
