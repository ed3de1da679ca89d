"""A layer that grows in place holds what a stock one holds, whatever is done to both."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.cache import (
    PreallocatedLayer,
    compact,
    entries_of,
    preallocate,
    restore_stock_layers,
)


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
