"""Drafting as one function of fixed shape: it can be traced whole, and gives what drafting level by level gives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.drafting.test_model_drafter import pairs
from tests.targets import Architecture
from transformers_resps import DraftHead, TreeShape
from transformers_resps.drafting import Committed, DraftCache, DraftRequest
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.drafting.passes import LevelDraft
from transformers_resps.drafting.step_model import likeliest
from transformers_resps.heads import BoundHead
from transformers_resps.tree import DraftTree


NEWEST = torch.empty(0)  # levels are drafted from what was observed


PAIRS = 4  # at most, at once
LENGTHS = (5, 9, 14, 40)
CASES: dict[str, tuple[dict[str, Any], TreeShape, str]] = {
    "a tree": ({}, TreeShape(12, 3, 3), "aot_eager"),
    "a chain of a head of two layers": ({"num_hidden_layers": 2}, TreeShape(4, 3, 1), "eager"),
    "one level of a draft vocabulary": ({"draft_vocab_size": 11}, TreeShape(4, 1, 3), "eager"),
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return Architecture("llama").build("sdpa")


def traced(
    function: Callable[..., tuple[Tensor, ...]], graphs: list[int], backend: str
) -> Callable[..., tuple[Tensor, ...]]:
    """The function as `torch.compile` runs it, without a break; the sizes of its graphs are noted."""

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(lambda *tensors: function(*tensors), fullgraph=True, backend=counting)


def whole_draft(draft: LevelDraft, tree_room: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return draft.of_tensors(DraftCache(tensors[5:], tree_room), *tensors[:5])


def cache_of(head: DraftHead, rows: int) -> DraftCache:
    cache, config = DraftCache(), head.config
    for layer in range(config.num_hidden_layers):
        new = torch.zeros(rows, config.num_key_value_heads, 1, config.head_dim or 0, dtype=head.dtype)
        cache.of_layer(layer, new, new)
    return cache


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_graph_drafts_what_levels_one_by_one_draft_at_every_length(target: PreTrainedModel, case: str) -> None:
    torch.manual_seed(1)
    head_options, shape, backend = CASES[case]
    head = DraftHead.from_target(target, **head_options)
    bound, graphs = BoundHead(head, target), list[int]()
    generator = ModelDrafter(bound, 1, None)
    cache, level_draft = cache_of(head, 1), LevelDraft(bound, shape)
    draft = traced(partial(whole_draft, level_draft, cache.tree_room), graphs, backend)
    features, tokens = pairs(head, 1, max(LENGTHS))
    read = 0
    for length in LENGTHS:
        for start in range(read, length, PAIRS):
            new = slice(start, min(start + PAIRS, length))
            generator.observe(Committed(tokens[:, new], features[:, new]))
            missing = PAIRS - (new.stop - new.start)
            slots = torch.tensor([[cache.capacity - 1] * missing + list(range(new.start, new.stop))])
            states, read_tokens = torch.zeros(1, PAIRS, features.shape[2]).double(), torch.zeros_like(slots)
            states[:, missing:], read_tokens[:, missing:] = features[:, new], tokens[:, new]
            shown = torch.ones(1, 1, dtype=torch.bool)
            outputs = draft(states, read_tokens, slots, slots + 7, shown, *cache.buffers)
        read = length
        _, pool, tree = level_draft.found(outputs, tokens[:, length - 1])
        expected = generator.draft(NEWEST, DraftRequest(shape))
        ranked = DraftTree.from_pool(tokens[:, length - 1], expected, shape.total_tokens)
        for ours, theirs in ((pool, expected), (tree, ranked)):
            for name in type(theirs).__slots__:
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert len(graphs) == 1  # no length is compiled again


@torch.no_grad()
def test_rows_of_unequal_lengths_and_padding_are_values_too(target: PreTrainedModel) -> None:
    torch.manual_seed(1)
    shape, lengths, pads = TreeShape(12, 3, 3), (6, 9), (0, 2)
    head = DraftHead.from_target(target)
    bound = BoundHead(head, target)
    cache, level_draft = cache_of(head, 2), LevelDraft(bound, shape)
    features, tokens = pairs(head, 2, 9)
    shown = torch.arange(cache.capacity) >= torch.tensor(pads)[:, None]
    dump, none = cache.capacity - 1, torch.zeros(2, 9, dtype=torch.long)
    slots = torch.tensor([[dump] * (9 - length) + list(range(length)) for length in lengths])
    ordered = [torch.cat([none[row, : 9 - length], tokens[row, :length]]) for row, length in enumerate(lengths)]
    states = [
        torch.nn.functional.pad(features[row, :length], (0, 0, 9 - length, 0)) for row, length in enumerate(lengths)
    ]
    outputs = level_draft.of_tensors(cache, torch.stack(states), torch.stack(ordered), slots, slots, shown)
    _, pool, _ = level_draft.found(outputs, slots[:, -1])
    for row, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        alone = ModelDrafter(bound, 1, None)
        alone.observe(Committed(tokens[row : row + 1, pad:length], features[row : row + 1, pad:length]))
        expected = alone.draft(NEWEST, DraftRequest(shape))
        assert pool.tokens[row].tolist() == expected.tokens[0].tolist()
        torch.testing.assert_close(pool.scores[row], expected.scores[0])


@pytest.mark.parametrize(("tokens", "count"), [(8192, 4), (12_300, 8), (9_000, 150), (500, 3)])
def test_the_likeliest_tokens_are_those_with_the_largest_log_probabilities(tokens: int, count: int) -> None:
    logits = torch.randperm(6 * tokens, generator=torch.manual_seed(0)).view(2, 3, tokens) / tokens
    sorted_scores, order = logits.log_softmax(-1).sort(dim=-1, descending=True)
    values, ids = likeliest(logits, count)
    assert torch.equal(values, sorted_scores[..., :count])
    assert torch.equal(ids, order[..., :count])


def test_a_token_of_no_probability_still_has_an_id_of_the_vocabulary() -> None:
    logits = torch.full((1, 1, 8200), -torch.inf)
    logits[..., 8100] = 0.0
    values, ids = likeliest(logits, 3)
    assert values.tolist() == [[[0.0, -torch.inf, -torch.inf]]]
    assert ids[0, 0, 0] == 8100
    assert ids.max() < 8200
