"""When the head reads what was committed, and with how much attention: a draft depends on neither."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import Committed, DraftRequest, cache
from transformers_resps.drafting.engine import MAX_UNREAD
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.heads import BoundHead
from transformers_resps.tree import CandidatePool
from transformers_resps.verifying.attention import attend


NEWEST = torch.empty(0)  # levels are drafted from what was observed


SHAPE = TreeShape(9, 2, 3)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


def head_of(
    target: PreTrainedModel, window: int | None = None, *, layers: int = 1, rope: dict[str, Any] | None = None
) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, num_hidden_layers=layers, sliding_window=window, rope_parameters=rope)


def pairs(head: DraftHead, rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features and tokens of committed positions."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, count, head.config.features_width, generator=generator, dtype=head.dtype)
    return features, torch.randint(0, VOCABULARY, (rows, count), generator=generator)


def draft(generator: ModelDrafter) -> CandidatePool:
    with torch.no_grad():
        return generator.draft(NEWEST, DraftRequest(SHAPE))


@pytest.mark.parametrize(("layers", "window"), [(1, None), (2, None), (1, 32)])
def test_a_draft_is_the_same_however_the_text_was_read(
    target: PreTrainedModel, layers: int, window: int | None
) -> None:
    head = head_of(target, window, layers=layers)
    features, tokens = pairs(head, rows=1, count=40)
    pools = []
    for at_least in (1, 7, 1000):
        generator = ModelDrafter(BoundHead(head, target), 1, None)
        for place in range(40):
            generator.observe(Committed(tokens[:, place : place + 1], features[:, place : place + 1]))
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
    rows = []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
        rows.append(None if mask is None else mask.shape[2])
        return attend(query, key, value, mask)

    monkeypatch.setattr(cache, "attend", watched)
    head = head_of(target, layers=layers)
    features, tokens = pairs(head, rows=2, count=9)
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    together = ModelDrafter(BoundHead(head, target), 2, mask)
    alone = ModelDrafter(BoundHead(head, target), 1, None)
    for cut in (slice(0, 6), slice(6, 9)):
        together.observe(Committed(tokens[:, cut], features[:, cut]))
        alone.observe(Committed(tokens[1:, max(cut.start, 3) : cut.stop], features[1:, max(cut.start, 3) : cut.stop]))
        with torch.no_grad():
            together.read()
            alone.read()
    assert rows == ([1, None, 1, None] if layers == 1 else [6, 1, None, 3, 1, 3, 1])
    found, expected = draft(together), draft(alone)
    assert found.tokens[1].tolist() == expected.tokens[0].tolist()
    torch.testing.assert_close(found.scores[1], expected.scores[0])


def test_few_pairs_wait_for_a_policy_that_asks_no_head(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, observe = [], ModelDrafter.observe

    def watched(self: ModelDrafter, *committed: Any) -> None:
        observe(self, *committed)
        waiting.append(self._text.waiting)

    monkeypatch.setattr(ModelDrafter, "observe", watched)
    monkeypatch.setattr(FixedPolicy, "wants_head", lambda *_: True)
    options = {"assistant_model": head_of(target), "policy": FixedPolicy(TreeShape.plain())}
    target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=MAX_UNREAD + 6, **options)
    assert max(waiting) == MAX_UNREAD and waiting[-1] < 6


WINDOW, STRIDE = 32, 2


def oldest_seen(length: int) -> int:
    return STRIDE * -(-max(length - WINDOW, 0) // STRIDE)


def alone(head: DraftHead, target: PreTrainedModel, features: torch.Tensor, tokens: torch.Tensor) -> CandidatePool:
    """What a head drafts that reads these pairs at once."""
    drafter = ModelDrafter(BoundHead(head, target), 1, None)
    drafter.observe(Committed(tokens, features))
    return draft(drafter)


@pytest.mark.parametrize("rope", [None, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}], ids=["rope", "yarn"])
def test_a_draft_sees_the_newest_of_a_window_as_if_they_were_the_text(
    target: PreTrainedModel, rope: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding, because RoPE is relative; and bit by bit what it drafts without a window that holds the text."""
    whole, narrow, looked_at = head_of(target, rope=rope), head_of(target, WINDOW, rope=rope), list[int]()

    def watched(query: torch.Tensor, key: torch.Tensor, *others: Any) -> torch.Tensor:
        looked_at.append(key.shape[2])
        return attend(query, key, *others)

    features, tokens = pairs(whole, rows=1, count=150)
    drafters = [ModelDrafter(BoundHead(head, target), 1, None) for head in (whole, narrow)]
    place, kept = 0, []
    for length in (20, 31, 32, 33, 34, 35, 120, 123, 150):
        for drafter in drafters:
            drafter.observe(Committed(tokens[:, place:length], features[:, place:length]))
        place, seen = length, slice(oldest_seen(length), length)
        with monkeypatch.context() as patch:
            patch.setattr(cache, "attend", watched)
            found = draft(drafters[1])
        expected, full = alone(whole, target, features[:, seen], tokens[:, seen]), draft(drafters[0])
        assert found.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(found.scores, expected.scores)
        kept.append(torch.equal(found.scores, full.scores))
    assert kept == [True] * 3 + [False] * 6
    assert max(looked_at) == WINDOW + SHAPE.top_k


def test_rows_of_a_batch_forget_what_none_of_them_sees(target: PreTrainedModel) -> None:
    whole, narrow = head_of(target), head_of(target, WINDOW)
    features, tokens = pairs(whole, rows=2, count=100)
    together = ModelDrafter(BoundHead(narrow, target), 2, torch.tensor([[1] * 40, [0] * 10 + [1] * 30]))
    together.observe(Committed(tokens[:, :40], features[:, :40]))
    ends, order = [40, 40], torch.arange(2)[:, None]
    for step in range(15):
        gained = [3, 1 + step % 2]
        rows = list(zip(ends, gained, strict=True))
        places = torch.tensor([[end + min(at, own - 1) for at in range(3)] for end, own in rows])
        together.observe(Committed(tokens[order, places], features[order, places], [[0] * own for own in gained]))
        ends = [end + own for end, own in rows]
        if step % 4 == 2:
            found = draft(together)
            for row, end in enumerate(ends):
                seen = slice(max(oldest_seen(min(ends)), 10 * row), end)
                expected = alone(whole, target, features[row, None, seen], tokens[row, None, seen])
                assert found.tokens[row].tolist() == expected.tokens[0].tolist()
                torch.testing.assert_close(found.scores[row], expected.scores[0])
    together.keep_rows([0])
    together.observe(Committed(tokens[:1, ends[0], None], features[:1, ends[0], None]))
    seen = slice(oldest_seen(ends[0] + 1), ends[0] + 1)
    torch.testing.assert_close(
        draft(together).scores, alone(whole, target, features[:1, seen], tokens[:1, seen]).scores
    )
