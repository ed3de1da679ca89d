"""Processors over a whole tree, against the same processors called for one node at a time."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import logits_process

from tests.trees import path_of, trees
from transformers_resps.decoding.processors import STATELESS, TreeLogitsProcessor, is_stateless
from transformers_resps.tree import DraftTree


VOCABULARY = 11
TEXT = torch.tensor([[3, 1, 2, 1, 2]])  # ends in the root

# By name, several of each where a setting changes what it reads. The lengths lie inside the tree.
MADE: dict[str, list[Callable[[Any], LogitsProcessor]]] = {
    "TemperatureLogitsWarper": [lambda kind: kind(0.7)],
    "TopPLogitsWarper": [lambda kind: kind(0.6)],
    "TopKLogitsWarper": [lambda kind: kind(3)],
    "TopHLogitsWarper": [lambda kind: kind(0.5)],
    "MinPLogitsWarper": [lambda kind: kind(0.2)],
    "TypicalLogitsWarper": [lambda kind: kind(0.6)],
    "EpsilonLogitsWarper": [lambda kind: kind(0.1)],
    "EtaLogitsWarper": [lambda kind: kind(0.2)],
    "InfNanRemoveLogitsProcessor": [lambda kind: kind()],
    "LogitNormalization": [lambda kind: kind()],
    "SuppressTokensLogitsProcessor": [lambda kind: kind([2, 5])],
    "SuppressTokensAtBeginLogitsProcessor": [lambda kind: kind([2, 5], 6)],
    "MinLengthLogitsProcessor": [lambda kind: kind(7, 2)],
    "MinNewTokensLengthLogitsProcessor": [lambda kind: kind(3, 4, 2)],
    "RepetitionPenaltyLogitsProcessor": [lambda kind: kind(1.7), lambda kind: kind(1.7, 5)],
    "NoRepeatNGramLogitsProcessor": [lambda kind: kind(2)],
    "SequenceBiasLogitsProcessor": [lambda kind: kind({(4,): 1.5, (1, 2): -2.0, (2, 1, 3): 3.0})],
    "NoBadWordsLogitsProcessor": [lambda kind: kind([[4], [1, 2], [2, 1, 3]])],
    "ForcedBOSTokenLogitsProcessor": [lambda kind: kind(3)],
    "ForcedEOSTokenLogitsProcessor": [lambda kind: kind(7, 2)],
    "ExponentialDecayLengthPenalty": [lambda kind: kind((1, 1.5), 2, 5)],
    "WatermarkLogitsProcessor": [lambda kind: kind(VOCABULARY, "cpu")],
}


def kind_of(name: str) -> type[LogitsProcessor]:
    kind: type[LogitsProcessor] = getattr(logits_process, name)
    return kind


def one_by_one(processors: LogitsProcessorList, text: torch.Tensor, scores: torch.Tensor, tree: DraftTree) -> Any:
    """Each node with its own text, in a call of its own."""
    tokens, above = tree.tokens[0], tree.parents[0].tolist()
    rows = []
    for node in range(tree.node_count):
        prefix = torch.cat([text, tokens[path_of(above, node)[1:]][None]], dim=1)
        rows.append(processors(prefix, scores[node : node + 1].clone()))
    return torch.cat(rows)


def scores_of(tree: DraftTree) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tree.node_count)
    return torch.randn(tree.node_count, VOCABULARY, generator=generator) * 2


@pytest.mark.parametrize("name", sorted(STATELESS))
def test_every_node_gets_what_its_own_text_gets(name: str) -> None:
    """Also twice in a row, since some prepare themselves at the first call."""

    @settings(max_examples=30)
    @given(trees(10))
    def check(tree: DraftTree) -> None:
        for make in MADE[name]:
            mine, theirs = (LogitsProcessorList([make(kind_of(name))]) for _ in range(2))
            for text in (TEXT, TEXT[:, -1:], TEXT):
                expected = one_by_one(theirs, text, scores_of(tree), tree)
                assert torch.equal(TreeLogitsProcessor(mine)(text, scores_of(tree), tree), expected)

    check()


@settings(max_examples=50)
@given(trees(10))
def test_processors_follow_each_other_in_the_callers_order(tree: DraftTree) -> None:
    names = ("RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper")
    for order in (names, names[::-1]):
        processors = LogitsProcessorList([MADE[name][0](kind_of(name)) for name in order])
        expected = one_by_one(processors, TEXT, scores_of(tree), tree)
        assert torch.equal(TreeLogitsProcessor(processors)(TEXT, scores_of(tree), tree), expected)


class Noting(LogitsProcessor):
    """Keeps the shapes that it is called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.shapes.append((*input_ids.shape, *scores.shape))
        return scores


def test_a_level_is_one_call() -> None:
    tree = DraftTree.from_parents(torch.tensor([[2, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 0, 2]]))
    noting = Noting()
    processed = TreeLogitsProcessor(LogitsProcessorList([noting]))(TEXT, scores_of(tree), tree)
    assert noting.shapes == [(1, 5, 1, 11), (2, 6, 2, 11), (1, 7, 1, 11), (1, 8, 1, 11)]
    assert torch.equal(processed, scores_of(tree))


def test_it_is_a_logits_processor_that_a_list_calls_with_a_tree() -> None:
    tree = DraftTree.root_only(torch.tensor([2]))
    warper = TreeLogitsProcessor(LogitsProcessorList([TemperatureLogitsWarper(2.0)]))
    assert isinstance(warper, LogitsProcessor)
    processed = LogitsProcessorList([warper])(TEXT, scores_of(tree), tree=tree)
    assert torch.equal(processed, scores_of(tree) / 2)


# --- which processors are known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STATELESS))
def test_every_known_name_is_a_processor_of_transformers(name: str) -> None:
    assert issubclass(kind_of(name), LogitsProcessor)
    assert is_stateless(MADE[name][0](kind_of(name)))


@pytest.mark.parametrize("name", sorted(STATELESS))
def test_a_subclass_may_do_anything(name: str) -> None:
    own = MADE[name][0](type(name, (kind_of(name),), {}))
    assert not is_stateless(own)
    assert not TreeLogitsProcessor.supports(LogitsProcessorList([TemperatureLogitsWarper(0.5), own]))


def test_a_prompt_length_for_each_row_belongs_to_rows() -> None:
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(1.5)
    penalty.prompt_ignore_length = torch.tensor([3])  # which not every constructor takes
    assert not TreeLogitsProcessor.supports(LogitsProcessorList([penalty]))


def test_what_keeps_a_state_or_looks_at_rows_is_unknown() -> None:
    known = {kind_of(name) for name in STATELESS}
    for kind in (
        PrefixConstrainedLogitsProcessor,
        SynthIDTextWatermarkLogitsProcessor,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    ):
        assert kind not in known
    processors = {
        name
        for name, kind in inspect.getmembers(logits_process, inspect.isclass)
        if issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
    }
    unknown = {name for name in processors - STATELESS if not name.startswith(("Whisper", "Bark", "Dia", "Encoder"))}
    assert unknown == {
        "PrefixConstrainedLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "AlternatingCodebooksLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
    }


def test_a_watermark_waits_for_the_path() -> None:
    watermark = MADE["WatermarkLogitsProcessor"][0](kind_of("WatermarkLogitsProcessor"))
    assert is_stateless(watermark) and not TreeLogitsProcessor.supports(LogitsProcessorList([watermark]))
