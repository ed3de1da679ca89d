"""Masks and positions of random trees against brute force."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from tests.trees import path_of, trees
from tests.verifying.filled_cache import filled_cache
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.masks import AttentionPattern, additive, tree_attention_mask, tree_positions


@settings(max_examples=300)
@given(st.none() | st.integers(1, 6), st.booleans(), st.lists(st.integers(-3, 9), min_size=1, max_size=6), st.data())
def test_a_pattern_shows_what_its_window_and_causality_leave(
    window: int | None, is_causal: bool, queries: list[int], data: st.DataObject
) -> None:
    pattern, keys = AttentionPattern(window, is_causal), range(9)
    shown = [data.draw(st.lists(st.booleans(), min_size=9, max_size=9)) for _ in queries]
    places = torch.tensor(queries)[:, None], torch.arange(9)
    by_positions, given_some = pattern.mask(*places), pattern.mask(*places, torch.tensor(shown))
    for query, own, *masks in zip(queries, shown, by_positions.tolist(), given_some.tolist(), strict=True):
        near = [window is None or query - key < window for key in keys]
        assert masks[0] == [
            is_near and (key <= query or not is_causal) for key, is_near in zip(keys, near, strict=True)
        ]
        assert masks[1] == [is_near and is_shown for is_near, is_shown in zip(near, own, strict=True)]
    for length in range(1, 10):
        order = torch.arange(length)
        hides = not AttentionPattern(window).mask(order[:, None], order).equal(order <= order[:, None])
        assert pattern.cuts(length) == hides


def test_an_additive_mask_is_never_bool() -> None:
    """Eager attention adds its mask to the scores: a bool one would be silently wrong."""
    seen, lowest = torch.tensor([[True, False], [True, True]]), torch.finfo(torch.bfloat16).min
    mask = additive(seen, torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.tolist() == [[0, lowest], [0, 0]]
    assert additive(seen, torch.float64, past=1, hidden=-2.0).tolist() == [[0, 0, -2], [0, 0, 0]]


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
        assert int(tree_positions(tree, past)[0, node]) == past + len(path) - 1
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
