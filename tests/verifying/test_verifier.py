"""The target's side of a step: what it keeps is what plain decoding would have read."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tests.compilation.as_it_is import compiled_as_it_is
from tests.conftest import build_target
from tests.drafting.test_engine import FakeCapture
from tests.targets import ARCHITECTURES, Architecture
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.growing import GrowingMode
from transformers_resps.verifying.invariant.calls import InvariantMode
from transformers_resps.verifying.invariant.row_classes import RowNeeds
from transformers_resps.verifying.invariant.verifier import ModelCode
from transformers_resps.verifying.prepacking import prepack
from transformers_resps.verifying.slots import engine as slots
from transformers_resps.verifying.slots.engine import SlotEngine
from transformers_resps.verifying.slots.verifier import SlotMode, SlotVerifier
from transformers_resps.verifying.verifier import Verifier


PROMPTS = torch.tensor([[3, 4, 5, 6, 7], [9, 1, 2, 6, 6]])
TREE = DraftTree.from_parents(
    torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]]), torch.tensor([[0, 0, 0, 1, 2]] * 2)
)
BRANCH, CHAIN = [0, 2, 4], [0, 1, 3]
LEAST_ROWS = 4
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
POSITIONS = (PADDED.cumsum(-1) - 1).clamp(min=0)
KEPT = [[BRANCH, CHAIN], [BRANCH, CHAIN[:1]]]  # as many nodes of each row, and not


@pytest.fixture
def target() -> PreTrainedModel:
    return build_target().double()


def logits_after(target: PreTrainedModel, text: list[int]) -> Tensor:
    return target(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def text_of(row: int, path: list[int]) -> list[int]:
    return [*PROMPTS[row].tolist(), *TREE.tokens[row, path].tolist()]


@pytest.fixture
def lent() -> Iterator[ExitStack]:
    """What is lent to a test, which compiles nothing."""
    with compiled_as_it_is(), ExitStack() as stack:
        yield stack


def invariant(needs: RowNeeds, engine: SlotEngine | None = None, *, compiles: bool = False) -> InvariantMode:
    return InvariantMode(engine or SlotEngine(), ModelCode(), needs, compiles)


@pytest.fixture(params=["growing", "slots", "compiled", "invariant", "exact"])
def opened(request: pytest.FixtureRequest, lent: ExitStack) -> Callable[..., Verifier]:
    """`opened(target, prompt_length, positions=None, mask=None, cache=None, layers=None)`."""

    def make(
        target: PreTrainedModel,
        length: int,
        positions: Any = None,
        mask: Tensor | None = None,
        cache: Any = None,
        layers: list[int] | None = None,
    ) -> Verifier:
        forward = TargetForward(target, layers, DynamicCache(config=target.config) if cache is None else cache)
        positions = torch.arange(length)[None] if positions is None else positions
        if request.param in ("invariant", "exact"):
            needs = RowNeeds(LEAST_ROWS, is_exact=request.param == "exact")
            return invariant(needs).verifier(forward, positions, mask)
        if request.param == "compiled":
            return SlotMode().verifier(forward, positions, mask, lent.enter_context(SlotEngine().borrow(target)))
        return (SlotMode() if request.param == "slots" else GrowingMode()).verifier(forward, positions, mask)

    return make


@torch.no_grad()
def test_each_node_is_verified_as_the_end_of_its_own_path(target: PreTrainedModel, opened: Any) -> None:
    with opened(target, 5) as verifier:
        last, _ = verifier.prefill(PROMPTS, logits_to_keep=1)
        found, _ = verifier.verify(TREE)
    for row in range(2):
        torch.testing.assert_close(last[row, -1], logits_after(target, text_of(row, [])))
        for path in ([0], [0, 1], [0, 2], CHAIN, BRANCH):
            torch.testing.assert_close(found[row, path[-1]], logits_after(target, text_of(row, path)))


@torch.no_grad()
@pytest.mark.parametrize("paths", KEPT, ids=str)
def test_a_tree_after_kept_nodes_continues_each_rows_own_path(
    target: PreTrainedModel, paths: list[list[int]], opened: Any
) -> None:
    """Rows that keep as many nodes, and rows that do not; then the second row goes on alone."""
    padded = torch.tensor([path + path[-1:] * (3 - len(path)) for path in paths])
    texts = [text_of(row, path) for row, path in enumerate(paths)]
    with opened(target, 5) as verifier:
        verifier.prefill(PROMPTS)
        verifier.verify(TREE)
        verifier.undo()
        verifier.verify(TREE)
        verifier.keep(padded, paths)
        found, _ = verifier.verify(DraftTree.root_only(torch.tensor([30, 31])))
        verifier.keep(torch.zeros(2, 1, dtype=torch.long), [[0], [0]])
        verifier.keep_rows([1])
        alone, _ = verifier.verify(TREE.row(0))
        assert verifier.length == len(texts[1]) + 1
    for row, token in enumerate((30, 31)):
        torch.testing.assert_close(found[row, 0], logits_after(target, [*texts[row], token]))
    torch.testing.assert_close(alone[0, 4], logits_after(target, [*texts[1], 31, *TREE.tokens[0, BRANCH].tolist()]))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_a_lone_root_is_filled_up_to_as_many_nodes_as_the_verifier_says(
    target: PreTrainedModel, rows: int, opened: Any
) -> None:
    counts = list[int]()
    with opened(target, 5) as verifier:
        verifier.prefill(PROMPTS[:rows])
        target.get_input_embeddings().register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
        verifier.verify(DraftTree.root_only(PROMPTS[:rows, 0]))
        more = rows - 1 if verifier.pricing.packs_rows else 0  # their other roots
        assert counts == [verifier.pricing.least_nodes + more] * len(counts) and counts
        assert verifier.pricing.least_nodes == 1 or isinstance(verifier, SlotVerifier)


@torch.no_grad()
@pytest.mark.parametrize("parents", [[0, 0, 1], [0, 0, 0, 1]], ids=["chain", "branch"])
def test_a_drafted_token_that_overflows_float16_changes_no_bit_of_a_node_that_does_not_see_it(
    parents: list[int],
) -> None:
    """Not in its forward, nor in the next one, after it was rejected: a masked NaN is NaN."""
    target: Any = build_target().half()
    target.model.embed_tokens.weight[63] = torch.inf
    tokens = torch.tensor([[11, 12, 13, 14][: len(parents)]])
    tokens[0, -1] = 63
    trees = [DraftTree.from_parents(tokens, torch.tensor([parents])), DraftTree.root_only(tokens[:, 0])]
    logits = []
    for tree in trees:
        forward = TargetForward(target, None, DynamicCache(config=target.config))
        with invariant(RowNeeds(16)).verifier(forward, torch.arange(5)[None]) as verifier:
            verifier.prefill(PROMPTS[:1])
            first, _ = verifier.verify(tree)
            verifier.keep(torch.tensor([[0]]), [[0]])
            second, _ = verifier.verify(DraftTree.root_only(torch.tensor([15])))
        logits.append(torch.stack([first[0, 0], second[0, 0]]))
    assert logits[1].isfinite().all() and torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral-window", "gemma3_text"])
@pytest.mark.parametrize("paths", KEPT, ids=str)
def test_it_hands_out_the_keys_of_kept_tokens_that_a_rows_next_token_sees(
    model_type: str, paths: list[list[int]], opened: Any
) -> None:
    """Padding, windows, a rejected tree and rejected nodes, rows that end at the same place or not."""
    target = next(found for found in ARCHITECTURES if str(found) == model_type).build("sdpa")
    padded = torch.tensor([path + path[-1:] * (3 - len(path)) for path in paths])
    prompts, small = PROMPTS % 19, replace(TREE, tokens=TREE.tokens % 19)
    with opened(target, 5, POSITIONS, PADDED) as verifier:
        verifier.prefill(prompts)
        verifier.verify(small)
        verifier.undo()
        for _ in range(3):
            verifier.verify(small)
            verifier.keep(padded, paths)
        entries = verifier.target_entries()
    for row, (path, pads) in enumerate(zip(paths, (2, 0), strict=True)):
        text = [*prompts[row, pads:].tolist(), *small.tokens[row, path].tolist() * 3]
        assert entries.positions.expand(2, 1)[row].tolist() == [len(text)]
        cache: Any = DynamicCache()  # without windows: it keeps every key
        target(input_ids=torch.tensor([text]), use_cache=True, **{CACHE_KEYWORD: cache})
        for kind, (keys, values) in entries.states.items():
            shown = entries.masks[kind].expand(2, -1, -1, -1)[row, 0, 0] == 0
            index = max(at for at, own in enumerate(getattr(target.config, "layer_types", [kind] * 4)) if own == kind)
            window = 7 if kind == "sliding_attention" or model_type == "mistral-window" else len(text)
            for found, whole in ((keys, cache.layers[index].keys), (values, cache.layers[index].values)):
                assert sorted_entries(found[row, :, shown]) == sorted_entries(whole[0, :, -window:])


def sorted_entries(entries: Tensor) -> list[list[float]]:
    """Of the first head, in an order that does not depend on slots."""
    return sorted(entries[0].mul(1e6).round().div(1e6).add(0.0).tolist())


@torch.no_grad()
def test_it_leaves_a_stock_cache_with_what_was_kept_even_if_a_forward_is_cut(target: PreTrainedModel) -> None:
    cache: Any = DynamicCache(config=target.config)
    with (
        pytest.raises(ZeroDivisionError),
        GrowingMode().verifier(TargetForward(target, None, cache), torch.arange(5)[None]) as v,
    ):
        v.prefill(PROMPTS, chunk_size=2)
        v.verify(TREE)
        raise ZeroDivisionError
    assert cache.get_seq_length() == 5 and {type(layer) for layer in cache.layers} == {DynamicLayer}


@torch.no_grad()
def test_it_goes_on_after_what_the_cache_already_holds(target: PreTrainedModel) -> None:
    cache: Any = DynamicCache(config=target.config)
    with GrowingMode().verifier(TargetForward(target, None, cache), torch.arange(3)[None]) as verifier:
        verifier.prefill(PROMPTS[:, :3])
    with GrowingMode().verifier(TargetForward(target, None, cache), torch.arange(5)[None]) as verifier:
        verifier.prefill(PROMPTS)
        found, _ = verifier.verify(TREE)
    torch.testing.assert_close(found[0, 4], logits_after(target, text_of(0, BRANCH)))


@torch.no_grad()
def test_a_prompt_that_the_forward_lengthens_is_refused_with_the_reason(target: PreTrainedModel) -> None:
    cache: Any = DynamicCache(config=target.config)

    def read() -> Any:
        longer = torch.cat([PROMPTS, PROMPTS[:, :2]], dim=1)
        return target(input_ids=longer, position_ids=torch.arange(7)[None], use_cache=True, **{CACHE_KEYWORD: cache})

    with (
        pytest.raises(ValueError, match="LlamaForCausalLM reads a prompt of 5 positions as 7"),
        GrowingMode().verifier(TargetForward(target, None, cache), torch.arange(5)[None]) as verifier,
    ):
        verifier.prefill_by(read, rows=2)


@torch.no_grad()
@pytest.mark.parametrize("is_over_slots", [False, True], ids=["growing", "slots"])
def test_it_goes_on_at_the_positions_that_the_decoder_got(is_over_slots: bool) -> None:
    """Of a prompt that another has read; GPT-2 has a vector for each position."""
    learned = Architecture("gpt2", {"vocab_size": 32}).build("sdpa")
    cache: Any = DynamicCache(config=learned.config)
    forward, counted = TargetForward(learned, None, cache), torch.arange(5)[None]
    told = {"position_ids": torch.arange(3, 8)[None], "use_cache": True, CACHE_KEYWORD: cache}
    with (SlotMode() if is_over_slots else GrowingMode()).verifier(forward, counted) as verifier:
        last, _ = verifier.prefill_by(lambda: learned(input_ids=PROMPTS, **told), rows=2)
        found, _ = verifier.verify(TREE)
    for row in range(2):
        text, positions = torch.tensor([text_of(row, BRANCH)]), torch.arange(3, 11)[None]
        expected = learned(input_ids=text, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(last[row, -1], expected[4])
        torch.testing.assert_close(found[row, BRANCH[-1]], expected[-1])


# Over slots


def keys_of(target: PreTrainedModel, text: list[int], layer: int = 0) -> Tensor:
    """Of one layer, `[kv heads, s, hd]`, as the target reads a text at once."""
    cache: Any = DynamicCache()
    target(input_ids=torch.tensor([text]), use_cache=True, **{CACHE_KEYWORD: cache})
    keys: Tensor = cache.layers[layer].keys[0]
    return keys


@torch.no_grad()
@pytest.mark.parametrize("opened", ["slots", "compiled", "invariant", "exact"], indirect=True)
@pytest.mark.parametrize("paths", KEPT, ids=str)
def test_over_slots_what_was_kept_lies_in_the_order_of_the_text(
    target: PreTrainedModel, paths: list[list[int]], opened: Any
) -> None:
    """Also where rows end at different places."""
    padded = torch.tensor([path + path[-1:] * (3 - len(path)) for path in paths])
    with opened(target, 5, POSITIONS, PADDED) as verifier:
        verifier.prefill(PROMPTS)
        for _ in range(2):
            verifier.verify(TREE)
            verifier.keep(padded, paths)
        entries = verifier.target_entries()
    ((keys, _),), (mask,) = entries.states.values(), entries.masks.values()
    for row, pads in enumerate((2, 0)):
        text = [*PROMPTS[row, pads:].tolist(), *TREE.tokens[row, paths[row]].tolist() * 2]
        found = keys[row, :, mask.expand(2, -1, -1, -1)[row, 0, 0] == 0]
        torch.testing.assert_close(found, keys_of(target, text, layer=-1))


@torch.no_grad()
@pytest.mark.parametrize("paths", [[BRANCH, CHAIN], [BRANCH[:2], CHAIN[:2]]], ids=str)
def test_a_cache_gets_the_texts_where_its_mask_shows_them(
    target: PreTrainedModel, paths: list[list[int]], opened: Any
) -> None:
    cache: Any = DynamicCache(config=target.config)
    with opened(target, 5, POSITIONS, PADDED, cache) as verifier:
        verifier.prefill(PROMPTS)
        verifier.verify(TREE)
        verifier.keep(torch.tensor(paths), paths)
    for row, pads in enumerate((2, 0)):
        text = text_of(row, paths[row])[pads:]
        torch.testing.assert_close(cache.layers[0].keys[row, :, pads:], keys_of(target, text))


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_features_of_a_padded_prompt_stand_where_its_tokens_stand(
    target: PreTrainedModel, chunk_size: int | None, opened: Any
) -> None:
    with opened(target, 5, POSITIONS, PADDED, layers=[1]) as verifier:
        _, features = verifier.prefill(PROMPTS, chunk_size)
    found = torch.cat([part.caught[1] for part in features], dim=1)
    for row, pads in enumerate((2, 0)):
        outputs = target(input_ids=PROMPTS[row : row + 1, pads:], output_hidden_states=True)
        torch.testing.assert_close(found[row, pads:], outputs.hidden_states[1][0])


# The invariant one


@pytest.fixture
def row_counts(target: Any) -> list[int]:
    """Of each product of some layers."""
    counts: list[int] = []
    for layer in (target.model.layers[0].mlp.down_proj, target.lm_head):
        layer.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[:-1].numel()))
    return counts


@torch.no_grad()
@pytest.mark.parametrize("opened", ["invariant"], indirect=True)
def test_every_layer_multiplies_as_many_rows_as_the_machine_needs(
    target: PreTrainedModel, row_counts: list[int], opened: Any
) -> None:
    """A last chunk of one token, its logits alone, a lone root, two rows and the one that is left."""
    for rows in (1, 2):
        with opened(target, 5) as verifier:
            row_counts.clear()  # opening one reads a token, to see how layers keep entries
            verifier.prefill(PROMPTS[:rows], chunk_size=2, logits_to_keep=1)
            verifier.verify(TREE.row(0) if rows == 1 else TREE)
            verifier.keep(torch.tensor([CHAIN] * rows), [CHAIN] * rows)
            verifier.keep_rows([rows - 1])
            verifier.verify(DraftTree.root_only(torch.tensor([7])))
        assert len(row_counts) == 10 and not any(count % LEAST_ROWS for count in row_counts), row_counts


@torch.no_grad()
@pytest.mark.parametrize(("rows", "nodes", "multiplied"), [(1, 1, 4), (1, 3, 4), (1, 5, 5), (2, 1, 4), (2, 3, 6)])
def test_a_step_of_the_invariant_mode_has_four_nodes_at_least_where_layers_are_packed(
    target: PreTrainedModel, row_counts: list[int], rows: int, nodes: int, multiplied: int
) -> None:
    """oneDNN takes longer for fewer; a machine that asks for no number of rows still gets four. Stock layers take
    longer for more."""
    tokens = torch.arange(11, 11 + nodes).expand(rows, -1)
    tree = DraftTree.from_parents(tokens, torch.tensor([[0, *range(nodes - 1)]] * rows))
    for expected in (rows * nodes, multiplied):
        with invariant(RowNeeds(1)).verifier(TargetForward.of(target), torch.arange(5)[None]) as verifier:
            verifier.prefill(PROMPTS[:rows])
            row_counts.clear()
            verifier.verify(tree)
        assert row_counts == [expected, expected]
        prepack(target.float())


@torch.no_grad()
@pytest.mark.parametrize("opened", ["exact"], indirect=True)
def test_every_layer_multiplies_just_so_many_rows_where_a_kernel_goes_by_them_all(
    target: PreTrainedModel, row_counts: list[int], opened: Any
) -> None:
    """Chunks of two tokens, trees of five nodes, in two parts, and lone roots: row by row."""
    with opened(target, 5) as verifier:
        row_counts.clear()
        verifier.prefill(PROMPTS, chunk_size=2, logits_to_keep=1)
        verifier.verify(TREE)
        verifier.keep(torch.tensor([CHAIN] * 2), [CHAIN] * 2)
        verifier.keep_rows([1])
        verifier.verify(DraftTree.root_only(torch.tensor([7])))
    assert row_counts == [LEAST_ROWS] * 2 * (2 * 3 + 2 * 2 + 1)


def exact(
    target: PreTrainedModel,
    positions: Tensor,
    mask: Tensor | None = None,
    layers: list[int] | None = None,
    engine: SlotEngine | None = None,
) -> Verifier:
    mode = invariant(RowNeeds(16, is_exact=True), engine, compiles=engine is not None)
    return mode.verifier(TargetForward.of(target, layers), positions, mask, engine)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 60, 150])
def test_a_tree_in_several_forwards_gives_the_bits_of_its_text_read_as_a_prompt(length: int) -> None:
    """Of 40 nodes, in three forwards of 16 rows; in bfloat16, of two rows, of which one begins with padding."""
    target, random = build_target(max_position_embeddings=256).bfloat16(), torch.Generator().manual_seed(length)
    prompts, nodes = (torch.randint(1, 32, (2, count), generator=random) for count in (length, 40))
    above = [[int(torch.randint(max(node - 6, 0), node, (1,), generator=random)) for node in range(1, 40)]] * 2
    tree = DraftTree.from_parents(nodes, torch.tensor([[0, *parents] for parents in above]))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    with exact(target, (mask.cumsum(-1) - 1).clamp(min=0), mask) as verifier:
        verifier.prefill(prompts)
        found, _ = verifier.verify(tree)
    for row, node in ((0, 0), (0, 14), (0, 39), (1, 17), (1, 38)):
        path = tree.ancestors[row, node].nonzero().flatten()
        text = torch.cat([prompts[row, 3 * row :], tree.tokens[row, path]])[None]
        with exact(target, torch.arange(text.shape[1])[None]) as verifier:
            alone, _ = verifier.prefill(text, chunk_size=7)
        assert torch.equal(found[row, node], alone[0, 0]), (row, node)


@torch.no_grad()
def test_a_graph_of_each_row_gives_what_the_forwards_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is overwritten by the next part of a tree; three texts later no size is new."""
    monkeypatch.setattr(slots, "CapturedFunction", FakeCapture)
    monkeypatch.setattr(FakeCapture, "captures", 0)
    target, positions, engine = build_target().double(), torch.arange(5)[None], SlotEngine()
    parents = torch.tensor([[0, *range(19)]] * 2)
    tree, captures = DraftTree.from_parents(torch.arange(40).view(2, 20) % 32, parents), list[int]()
    for _ in range(3):
        with exact(target, positions, layers=[1]) as verifier:
            verifier.prefill(PROMPTS)
            expected, states = verifier.verify(tree)
        with engine.borrow(target), exact(target, positions, layers=[1], engine=engine) as verifier:
            verifier.prefill(PROMPTS)
            verifier.verify(DraftTree.root_only(torch.tensor([7, 8])))
            found, features = verifier.verify(tree)
        assert torch.equal(found, expected) and torch.equal(features.caught[1], states.caught[1])
        captures.append(FakeCapture.captures)
    assert captures == [4] * 3, "a part of the tree, with those before it or not, of each row"
