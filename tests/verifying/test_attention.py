"""Masks and positions of random trees against brute force."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from tests.trees import path_of, trees
from tests.verifying.filled_cache import filled_cache
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.attention import tree_attention_mask, tree_positions


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
