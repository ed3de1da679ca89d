"""Rows of a batch whose caches were kept apart: joined, they are the cache of the batch."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.caches import check_equal_caches
from tests.targets import ARCHITECTURES, Architecture
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.cache import copied_row
from transformers_resps.verifying.returned import EndedRow, UnreadDynamicCache, fill_static, whole_cache


TEXT = torch.randint(3, 19, (3, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1] * 5])  # of the prompts


@torch.no_grad()
def read(target: PreTrainedModel, tokens: torch.Tensor, cache: Any) -> Any:
    """Read a prompt, then one token at a time, as plain decoding does."""
    start = cache.get_seq_length()
    for stop in range(max(int(start), MASK.shape[1] - 1) + 1, tokens.shape[1] + 1):
        mask = torch.cat([MASK, MASK.new_ones(3, max(stop - MASK.shape[1], 0))], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        inputs = {"input_ids": tokens[:, start:stop], "attention_mask": mask, "position_ids": positions}
        target(**inputs, use_cache=True, **{CACHE_KEYWORD: cache})
        start = stop
    return cache


@pytest.fixture(params=[each for each in ARCHITECTURES if str(each) in ("llama", "gemma3_text")], ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    architecture: Architecture = request.param
    return architecture.build("sdpa")


def test_rows_that_ended_at_different_places_join_to_the_cache_of_the_batch(target: PreTrainedModel) -> None:
    rows = []
    for row, length in enumerate((6, 13, 9)):
        cache = read(target, TEXT[:, :length], DynamicCache(config=target.config))
        first = torch.tensor([length - int((MASK[row] == 0).sum())])
        rows.append(EndedRow(copied_row(cache, row, length), first))
        read(target, TEXT, cache)  # who decodes on leaves the copy as it is
    expected = read(target, TEXT[:, :-1], DynamicCache(config=target.config))
    check_equal_caches(whole_cache(target, rows, TEXT, MASK), expected)
    # of a text whose beginning has no tokens, the end is enough
    rows = [EndedRow(copied_row(expected, row, 13), torch.tensor([0])) for row in range(3)]
    check_equal_caches(whole_cache(target, rows, TEXT[:, -1:], None), expected)


@pytest.mark.parametrize("length", [6, 7, 8, 12])
def test_a_static_cache_filled_from_a_dynamic_one_goes_on_like_one_that_read(
    target: PreTrainedModel, length: int
) -> None:
    """Around the length of the window."""
    dynamic = read(target, TEXT[:, :length], DynamicCache(config=target.config))
    static = StaticCache(config=target.config, max_cache_len=20)
    filled = read(target, TEXT, fill_static(static, dynamic))
    expected = read(target, TEXT, StaticCache(config=target.config, max_cache_len=20))
    assert filled.get_seq_length() == expected.get_seq_length() == 14
    for ours, theirs in zip(filled.layers, expected.layers, strict=True):
        seen = theirs.keys.shape[2] if 14 - length >= theirs.keys.shape[2] - 1 else theirs.keys.shape[2] - 1
        torch.testing.assert_close(ours.keys[:, :, -seen:], theirs.keys[:, :, -seen:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("look", [len, copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_an_unread_cache_is_made_once_and_has_then_stock_layers(target: PreTrainedModel, look: Any) -> None:
    made: list[DynamicCache] = []

    def make() -> DynamicCache:
        made.append(read(target, TEXT, DynamicCache(config=target.config)))
        return made[-1]

    cache: Any = UnreadDynamicCache(make)
    assert isinstance(cache, DynamicCache) and not made
    look(cache)
    assert cache.layers is made[0].layers and cache.get_seq_length() == 14 and len(made) == 1
