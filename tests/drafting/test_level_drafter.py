"""When the head reads what was committed, and with how much attention: a draft depends on neither."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting.level_drafter import MAX_UNREAD, LevelDrafter
from transformers_resps.heads import BoundHead, DraftCache
from transformers_resps.tree import CandidatePool


SHAPE = TreeShape(9, 2, 3)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


def head_of(target: PreTrainedModel, layers: int = 1) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, num_hidden_layers=layers)


def pairs(head: DraftHead, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features and tokens of committed positions."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, count, head.config.features_width, generator=generator, dtype=head.dtype)
    return features, torch.randint(0, VOCABULARY, (rows, count), generator=generator)


def draft(generator: LevelDrafter) -> CandidatePool:
    with torch.no_grad():
        return generator.draft(SHAPE, FixedPolicy(SHAPE))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_draft_is_the_same_however_the_text_was_read(target: PreTrainedModel, layers: int) -> None:
    head = head_of(target, layers)
    features, tokens = pairs(head, rows=1, count=40)
    pools = []
    for at_least in (1, 7, 1000):
        generator = LevelDrafter(BoundHead(head, target), 1, None)
        for place in range(40):
            generator.observe(tokens[:, place : place + 1], features[:, place : place + 1])
            with torch.no_grad():
                generator.read(at_least)
        pools.append(draft(generator))
    for pool in pools[1:]:
        assert pool.tokens.tolist() == pools[0].tokens.tolist()
        torch.testing.assert_close(pool.scores, pools[0].scores)


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_changes_no_draft_and_one_query_needs_one_row_of_a_mask(
    target: PreTrainedModel, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, attend_from = [], DraftCache.attend_from

    def watched(self: DraftCache, start: int, mask: torch.Tensor | None, **options: Any) -> Any:
        rows.append(None if mask is None else mask.shape[2])
        return attend_from(self, start, mask, **options)

    monkeypatch.setattr(DraftCache, "attend_from", watched)
    head = head_of(target, layers)
    features, tokens = pairs(head, rows=2, count=9)
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    together = LevelDrafter(BoundHead(head, target), 2, mask)
    alone = LevelDrafter(BoundHead(head, target), 1, None)
    for cut in (slice(0, 6), slice(6, 9)):
        together.observe(tokens[:, cut], features[:, cut])
        alone.observe(tokens[1:, max(cut.start, 3) : cut.stop], features[1:, max(cut.start, 3) : cut.stop])
        with torch.no_grad():
            together.read()
            alone.read()
    assert rows == ([1, None, 1, None] if layers == 1 else [6, None, 3, 3])
    found, expected = draft(together), draft(alone)
    assert found.tokens[1].tolist() == expected.tokens[0].tolist()
    torch.testing.assert_close(found.scores[1], expected.scores[0])


def test_few_pairs_wait_for_a_policy_that_asks_no_head(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, observe = [], LevelDrafter.observe

    def watched(self: LevelDrafter, *committed: Any) -> None:
        observe(self, *committed)
        waiting.append(sum(block.tokens.shape[1] for block in self._unread))

    monkeypatch.setattr(LevelDrafter, "observe", watched)
    options = {"assistant_model": head_of(target), "policy": FixedPolicy(TreeShape.plain())}
    target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=MAX_UNREAD + 6, **options)
    assert max(waiting) == MAX_UNREAD and waiting[-1] < 6
