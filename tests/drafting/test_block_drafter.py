"""One pass drafts a tree: the best one of its slots' probabilities, whatever way the text was read."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps.drafting import Committed, DraftCache, DraftCall, Drafter, DraftRequest, StepModel
from transformers_resps.drafting.blocks import Branching, best_paths, bounds
from transformers_resps.heads import BlockHead, BlockHeadConfig
from transformers_resps.tree import CandidatePool, DraftTree, TreeShape


SHAPE = TreeShape(20, 4, 8)


def block_head(target: PreTrainedModel, **fields: Any) -> BlockHead:
    """A random head of five slots for a tiny target."""
    text = target.config.get_text_config()
    sizes = {"hidden_size": text.hidden_size, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    rest = {"num_key_value_heads": 2, "block_size": 5, "mask_token_id": 2, "feature_layers": [1, 3]}
    torch.manual_seed(3)
    head = BlockHead(BlockHeadConfig(**{**sizes, **rest, "vocab_size": text.vocab_size, **fields})).eval()
    with torch.no_grad():
        for weight in head.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return head


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target(initializer_range=0.3)


class Marginals:
    """Slots whose logits are given, `[b, D, v]`; a token may make those of the next slot steeper."""

    def __init__(self, logits: Tensor, steeper: Tensor | None = None) -> None:
        self._logits, self._steeper = logits, steeper

    def pool(self, top_k: int, most: int) -> CandidatePool:
        rows, levels, vocabulary = self._logits.shape

        def scores(level: int, chosen: Tensor | None, state: Tensor | None) -> tuple[Tensor, None]:
            logits = self._logits[:, level, None]
            if self._steeper is not None:
                parents = torch.zeros(rows, 1, dtype=torch.long) if chosen is None else chosen % vocabulary
                logits = logits * self._steeper[parents][..., None]
            kept, tokens = logits.log_softmax(-1).topk(top_k)
            return torch.full_like(logits, -torch.inf).scatter_(2, tokens, kept), None

        branching = Branching(torch.arange(vocabulary).expand(self._logits.shape), scores)
        shape = TreeShape(most + 1, levels, top_k)
        above, _ = bounds(shape, rows, torch.device("cpu"))
        return best_paths(branching, above, levels).pool(shape)


def best_first(logits: Tensor, steeper: Tensor | None, budget: int) -> list[tuple[int, ...]]:
    """The likeliest paths, by a heap that looks at every child of what it pops."""
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[int, ...]] = []
    while heap and len(found) <= budget:
        score, path = heapq.heappop(heap)
        found.append(path)
        if len(path) < len(logits):
            row = logits[len(path)] * (1 if steeper is None else steeper[path[-1] if path else 0])
            for token, gained in enumerate(row.log_softmax(-1).tolist()):
                heapq.heappush(heap, (score - gained, (*path, token)))
    return found[1:]


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return set(paths[1:])


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 9), st.integers(1, 40), st.booleans())
def test_the_tree_has_the_likeliest_paths_of_all(
    seed: int, levels: int, vocabulary: int, budget: int, depends: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, levels, vocabulary, generator=generator)
    steeper = torch.rand(vocabulary, generator=generator) * 2 if depends else None
    pool = Marginals(logits, steeper).pool(min(vocabulary, budget), budget)
    assert bool((pool.scores > -torch.inf).all())
    tree = DraftTree.from_pool(torch.zeros(1, dtype=torch.long), pool, budget + 1)
    assert paths_of(tree) == set(best_first(logits[0], steeper, budget))
    assert pool.levels.tolist() == sorted(pool.levels.tolist()) and bool(
        (pool.parents < torch.arange(9999)[: pool.parents.shape[1]]).all()
    )


def test_a_chain_takes_the_likeliest_token_of_each_slot() -> None:
    logits = torch.randn(2, 4, 10)
    pool = Marginals(logits).pool(1, 4)
    assert pool.tokens.tolist() == logits.argmax(-1).tolist()
    assert pool.parents.tolist() == [[-1, 0, 1, 2]] * 2


def observed(head: BlockHead, target: PreTrainedModel, rows: int = 1, mask: Tensor | None = None) -> Drafter:
    return head.drafter(DraftCall(target, rows=rows, paired_mask=mask))


def drafted(drafter: Drafter, root: Tensor, shape: TreeShape = SHAPE) -> CandidatePool:
    with torch.no_grad():
        return drafter.draft(root, DraftRequest(shape))


def text(rows: int, count: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """Random tokens, and features of the positions before them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (rows, count), generator=generator)
    return tokens, torch.randn(rows, count, width, generator=generator)


def assert_same(found: CandidatePool, wanted: CandidatePool, row: int = 0) -> None:
    assert found.tokens[row].tolist() == wanted.tokens[0].tolist()
    torch.testing.assert_close(found.scores[row], wanted.scores[0], atol=1e-4, rtol=1e-4)


KINDS: dict[str, dict[str, Any]] = {
    "in place": {},
    "shifted, of a causal layer and another": {"shifted": True, "causal": [True, False]},
    "windows": {"windows": [7, 9]},
    "one window": {"windows": [6, None]},
    "selector": {
        "correction": "selector",
        "correction_rank": 4,
        "selector_top_k": 12,
        "conv_kernel_size": 2,
        "conv_group_size": 8,
    },
    "rnn": {"correction": "rnn", "correction_rank": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_is_the_same_however_the_text_was_read(target: PreTrainedModel, kind: str) -> None:
    head = block_head(target, **KINDS[kind])
    tokens, features = text(1, 40)
    pools = []
    for cuts in ([40], [1] * 40, [3, 20, 1, 1, 15]):
        drafter, start = observed(head, target), 0
        for count in cuts:
            drafter.observe(Committed(tokens[:, start : start + count], features[:, start : start + count]))
            start += count
            with torch.no_grad():
                drafter.read()
        pools.append(drafted(drafter, tokens[:, -1:]))
    for pool in pools[1:]:
        assert_same(pool, pools[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_padded_or_gain_different_counts_draft_as_alone(target: PreTrainedModel, kind: str) -> None:
    head = block_head(target, **KINDS[kind])
    tokens, features = text(2, 14)
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    together = observed(head, target, 2, mask)
    together.observe(Committed(tokens[:, :6], features[:, :6]))
    drafted(together, tokens[:, 5:6])
    counts = [[4, 1], [1, 3], [2, 1]]
    starts = [6, 6]
    for own in counts:
        rows = [tokens[row, starts[row] : starts[row] + count].tolist() for row, count in enumerate(own)]
        order = [[starts[row] + min(at, count - 1) for at in range(max(own))] for row, count in enumerate(own)]
        places = torch.tensor(order)
        gained = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
        together.observe(Committed(tokens.gather(1, places), gained, rows))
        starts = [start + count for start, count in zip(starts, own, strict=True)]
        roots = torch.stack([tokens[row, start - 1] for row, start in enumerate(starts)])[:, None]
        pool = drafted(together, roots)
        for row, start in enumerate(starts):
            alone = observed(head, target)
            first = 3 if row else 0
            alone.observe(Committed(tokens[row : row + 1, first:start], features[row : row + 1, first:start]))
            assert_same(pool, drafted(alone, roots[row : row + 1]), row)
    together.keep_rows([1])
    assert_same(drafted(together, roots[1:]), drafted(alone, roots[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_after_acceptance_the_cache_holds_what_a_fresh_prefill_holds(
    target: PreTrainedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[DraftCache] = []
    monkeypatch.setattr(StepModel, "cache", lambda *_: caches.append(DraftCache()) or caches[-1])
    fields = KINDS[kind] if "windows" not in KINDS[kind] else {"windows": [40, 40]}
    head = block_head(target, **fields)
    tokens, features = text(1, 12)
    stepwise, fresh = observed(head, target), observed(head, target)
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 12)):
        stepwise.observe(Committed(tokens[:, start:stop], features[:, start:stop]))
        drafted(stepwise, tokens[:, stop - 1 : stop])
    fresh.observe(Committed(tokens, features))
    with torch.no_grad():
        fresh.read()
    for kept, wanted in zip(caches[0].buffers, caches[1].buffers, strict=True):
        own, theirs = (
            part.split([cache.tree_room, cache.capacity], dim=2)[1]
            for part, cache in zip((kept, wanted), caches, strict=True)
        )
        torch.testing.assert_close(own[:, :, :12], theirs[:, :, :12], atol=1e-5, rtol=1e-5)
        assert not own[:, :, 12:].any() and not theirs[:, :, 12:].any()  # nothing of a block


def widths_of(head: BlockHead, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each pass of a head has."""
    widths: list[int] = []
    forward = BlockHead.forward
    monkeypatch.setattr(
        BlockHead, "forward", lambda self, slots, *rest: widths.append(slots.shape[1]) or forward(self, slots, *rest)
    )
    return widths


@pytest.mark.parametrize(("fields", "widths"), [({}, [5, 5]), ({"causal": [True, True]}, [5, 3])])
def test_a_causal_block_has_no_more_slots_than_levels_and_says_the_same(
    target: PreTrainedModel, fields: dict[str, Any], widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = block_head(target, **fields)
    seen = widths_of(head, monkeypatch)
    tokens, features = text(1, 9)
    drafter = observed(head, target)
    drafter.observe(Committed(tokens, features))
    whole, cut = (drafted(drafter, tokens[:, -1:], TreeShape(9, depth, 8)) for depth in (9, 2))
    assert seen == widths  # one pass for each draft, however many levels
    assert int(whole.levels[-1]) == 4 and int(cut.levels[-1]) == 2
    count = cut.tokens.shape[1]
    assert whole.tokens[:, :count].tolist() == cut.tokens.tolist()
    torch.testing.assert_close(whole.scores[:, :count], cut.scores)


def test_scores_of_corrected_candidates_are_probabilities(target: PreTrainedModel) -> None:
    head = block_head(target, correction="gated", correction_rank=4, shifted=True, confidence=True)
    tokens, features = text(1, 9)
    drafter = observed(head, target)
    drafter.observe(Committed(tokens, features))
    pool = drafted(drafter, tokens[:, -1:], TreeShape(4000, 2, 64))
    sums: dict[int, float] = {}
    for parent, score in zip(pool.parents[0].tolist(), pool.scores[0].tolist(), strict=True):
        sums[parent] = sums.get(parent, 0.0) + math.exp(score)
    above: Sequence[float] = pool.scores[0].exp().tolist()
    assert all(total <= (above[parent] if parent >= 0 else 1.0) + 1e-5 for parent, total in sums.items())
