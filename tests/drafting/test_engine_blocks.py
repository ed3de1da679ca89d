"""Block drafts compiled, and as one launch: the pools of eager ones, at every length and shape, by one code."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.drafting import test_engine, test_engine_levels
from tests.drafting.test_block_drafter import KINDS, assert_same, block_head, text
from tests.drafting.test_engine import FakeCapture
from tests.drafting.test_engine_levels import Compiler
from transformers_resps import FixedPolicy, TreeShape
from transformers_resps.drafting import Committed, DraftCall, Drafter, DraftRequest
from transformers_resps.drafting.engine import DraftEngine, DraftEngines
from transformers_resps.heads import BlockHead
from transformers_resps.tree import CandidatePool


target, compiler = test_engine.target, test_engine_levels.compiler
SHAPES = (TreeShape(20, 4, 19), TreeShape(9, 2, 3), TreeShape(5, 4, 1), TreeShape(2, 1, 9), TreeShape(40, 3, 20))
HEADS = KINDS | {
    "a draft vocabulary": {"draft_vocab_size": 11, "owns_output_head": True, "confidence": True},
    "confidence": {"correction": "gated", "correction_rank": 4, "confidence": True, "confidence_with_markov": True},
}


class Both:
    """Two drafters that read the same text, one of them by an engine."""

    def __init__(self, head: BlockHead, target: PreTrainedModel, engines: DraftEngines, rows: int = 1) -> None:
        self.tokens, self.features = text(rows, 150, target.config.hidden_size * 2)
        self.tokens, self.features = self.tokens % target.config.vocab_size, self.features.to(head.dtype)
        mask = None if rows == 1 else torch.tensor([[1] * 5, [0] * 2 + [1] * 3, [1] * 5])
        self.ends = ExitStack()
        self.drafters = [
            head.drafter(DraftCall(target, rows=rows, paired_mask=mask, engines=lent, ends=self.ends))
            for lent in (engines, None)
        ]
        self.rows, self.read = rows, 0

    def observe(self, count: int, counts: list[int] | None = None) -> None:
        if self.read == 0 and count > 1:  # all but the newest are a prompt, which no draft reads
            self.observe(count - 1)
            count = 1
            for drafter in self.drafters:
                drafter.read()
        new = slice(self.read, self.read + count)
        self.read += count
        rows = None if counts is None else [[0] * own for own in counts]
        for drafter in self.drafters:
            drafter.observe(Committed(self.tokens[:, new], self.features[:, new], rows))

    def agree(self, shape: TreeShape) -> Drafter:
        root = self.tokens[:, self.read - 1 : self.read]
        fast, eager = (drafter.draft(root, DraftRequest(shape)) for drafter in self.drafters)
        for row in range(self.rows):
            assert_same(fast, _row(eager, row), row)
            assert fast.parents[row].tolist() == eager.parents[row].tolist()
        assert fast.levels.tolist() == eager.levels.tolist()
        return self.drafters[0]


def _row(pool: CandidatePool, row: int) -> CandidatePool:
    own = slice(row, row + 1)
    return CandidatePool(pool.tokens[own], pool.parents[own], pool.scores[own], pool.levels)


def head_for(target: PreTrainedModel, kind: str) -> BlockHead:
    head = block_head(target, **HEADS[kind]).to(target.dtype)
    if head.config.draft_vocab_size is not None:
        head.d2t.fill_(5)
    return head


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_a_launch_drafts_the_pool_and_its_tree(target: PreTrainedModel, kind: str) -> None:
    both = Both(head_for(target, kind), target, DraftEngines(lambda: DraftEngine(FakeCapture)))
    both.observe(2)
    for shape in SHAPES:
        for count in (1, 2, 1):
            launches = FakeCapture.launches
            both.observe(count)
            drafter = both.agree(shape)
            assert drafter.built_tree is not None and FakeCapture.launches > launches
    assert FakeCapture.launches == launches + 1, "a shape is captured once"


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_one_code_serves_all_lengths_and_shapes(
    target: PreTrainedModel,
    compiler: Compiler,
    kind: str,
) -> None:
    """Trees, chains, one level, and a text that outgrows the cache's first buffers."""
    compiler.traces = True
    both = Both(head_for(target, kind), target, DraftEngines())
    for count, shape in zip((1, 3, 2, 60, 1, 60), (*SHAPES, SHAPES[0]), strict=True):
        both.observe(count)
        both.agree(shape)
    assert compiler.count == 1


@torch.no_grad()
def test_one_code_serves_rows_that_gain_different_counts(
    target: PreTrainedModel,
    compiler: Compiler,
) -> None:
    compiler.traces = True
    both = Both(head_for(target, "windows"), target, DraftEngines(), rows=3)
    both.observe(5)
    both.agree(SHAPES[0])
    for counts, shape in (([2, 1, 4], SHAPES[1]), ([1, 1, 1], SHAPES[2]), ([3, 3, 1], SHAPES[0])):
        both.observe(max(counts), counts)
        both.agree(shape)
    assert compiler.count == 1


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_texts_are_those_of_plain_generate_whatever_is_compiled(
    target: PreTrainedModel,
    options: dict[str, Any],
    compiler: Compiler,
) -> None:
    head, prompt = head_for(target, "selector"), torch.tensor([[3, 4, 5, 3, 4]])
    texts = []
    for engines in (None, DraftEngines(lambda: DraftEngine(FakeCapture)), DraftEngines()):
        torch.manual_seed(0)
        drafts = {"assistant_model": head, "policy": FixedPolicy(SHAPES[0]), "cache_implementation": "static"}
        if engines is not None:
            target.speculation_state.draft_engines = engines
        call = {} if engines is None else drafts
        texts.append(target.generate(prompt, max_new_tokens=24, **{"do_sample": False, **options}, **call).tolist())
    assert texts[1:] == texts[:1] * 2 and FakeCapture.launches > 2 and compiler.count == 1
