"""Targets with recurrent layers: every tree gives the texts, random numbers and states of plain `generate`.

As it is, and by compiled steps, whose code is the function itself here.
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList

from tests.caches import check_equal_caches
from tests.compilation.as_it_is import AsItIs, compiled_as_it_is
from tests.lossless.hybrids import SAMPLED, AnyShape, answer, check_counts, compare, padded, tokens
from tests.lossless.test_options import StopAfter
from tests.recurrent_targets import NEEDS_STATES, RECURRENT, recurrent
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.slots import engine as slots


pytestmark = NEEDS_STATES
FAMILIES = recurrent("qwen3_next", "kimi_linear", "falcon_h1-clamped", "lfm3")


@pytest.fixture(scope="module", params=RECURRENT, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return attach(request.param.build())


@pytest.fixture(scope="module")
def early_head(target: PreTrainedModel) -> DraftHead:
    """Reads no output of the last layer, which compiled code does not give."""
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0, 1])


@pytest.fixture
def forwards() -> Iterator[list[tuple[torch.Size, torch.Size]]]:
    """Shapes of tokens and logits of each compiled forward."""
    with compiled_as_it_is() as noted:
        yield noted


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "repetition penalty": SAMPLED | {"repetition_penalty": 1.7},
    "stop string": {"stop_strings": ["dde", "bcd"], "tokenizer": letter_tokenizer()},
    "criterion": {"stopping_criteria": StoppingCriteriaList([StopAfter((16,))])},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_text_of_plain_generate(name: str, target: PreTrainedModel, head: DraftHead) -> None:
    is_basic = name in ("greedy", "sampled")
    reports = [compare(target, head, tokens(9, seed), seed, **OPTIONS[name]) for seed in range(1 + 2 * is_basic)]
    check_counts(*reports, in_a_row=2 if is_basic else 1)


BATCHES: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": [2]},
    "greedy in lockstep": {"lockstep": True, "prefill_chunk_size": 4},
    "sampled": SAMPLED | {"eos_token_id": [2]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_text_of_plain_generate_by_compiled_steps(
    name: str, target: PreTrainedModel, early_head: DraftHead, forwards: list[Any]
) -> None:
    report = compare(target, early_head, tokens(9), compile=True, **OPTIONS[name])
    check_counts(report, in_a_row=1)
    assert len(forwards) == report.target_forwards - 1, "the prompt is read as it is"


POLICIES = {
    "plain": FixedPolicy(TreeShape.plain()),
    "chain": FixedPolicy(TreeShape(6, 5, 1)),
    "tree": FixedPolicy(TreeShape(30, 3, 7)),
    "lookup": FixedPolicy(TreeShape(1, 0, 1, lookup=5)),
    "auto": "auto",
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_gives_the_text_of_plain_generate_by_compiled_steps(
    name: str, target: PreTrainedModel, early_head: DraftHead, forwards: list[Any]
) -> None:
    for text in (tokens(9), tokens(6, 1)):
        compare(target, early_head, text, policy=POLICIES[name], compile=True)
    assert forwards and all(shape[1] >= 4 for shape, _ in forwards), "so few nodes are filled up"


@pytest.mark.parametrize("name", BATCHES)
def test_a_padded_batch_gives_the_texts_of_plain_generate(
    name: str, target: PreTrainedModel, head: DraftHead, early_head: DraftHead, forwards: list[Any]
) -> None:
    check_counts(compare(target, head, padded(3), **BATCHES[name]), in_a_row=1)
    compare(target, early_head, padded(3), compile=True, **BATCHES[name])
    assert forwards


def check_three_turns(target: PreTrainedModel, head: DraftHead, rows: int, **options: Any) -> None:
    """The second turn is plain, so that each goes on from the other's states; turns cross the windows. `options` are
    of the others.
    """
    turns: list[Any] = [padded(rows, length=8)["input_ids"]] * 2
    caches = [DynamicCache(config=target.config.get_text_config(decoder=True)) for _ in turns]
    mask, reports = padded(rows, length=8)["attention_mask"], []
    for turn in range(3):
        outs = []
        for is_ours, (text, cache) in enumerate(zip(turns, caches, strict=True)):
            inputs = {"input_ids": text, "attention_mask": mask, CACHE_KEYWORD: cache}
            trees = {"assistant_model": head, "policy": AnyShape(turn)} | options if is_ours and turn != 1 else {}
            outs.append(answer(target, inputs, max_new_tokens=9, **trees))
        plain, found = outs
        assert found.sequences.tolist() == plain.sequences.tolist()
        check_equal_caches(*reversed(caches), most=1e-5)
        turns = [torch.cat([plain.sequences, tokens(4, turn, rows)], dim=1)] * 2
        mask = torch.cat([mask, mask.new_ones(rows, turns[0].shape[1] - mask.shape[1])], dim=1)
        if turn != 1:
            reports.append(found.speculation)
    check_counts(*reports, in_a_row=1)


def test_three_turns_each_go_on_from_the_states_of_the_last(target: PreTrainedModel, head: DraftHead) -> None:
    check_three_turns(target, head, rows=1)


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
def test_three_turns_of_a_batch_go_on_from_the_states_of_the_last(target: PreTrainedModel, head: DraftHead) -> None:
    check_three_turns(target, head, rows=3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("forwards")
def test_three_turns_of_compiled_steps_do_so_too(target: PreTrainedModel, early_head: DraftHead, rows: int) -> None:
    check_three_turns(target, early_head, rows, compile=True)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.usefixtures("forwards")
def test_a_call_that_ends_in_the_middle_of_a_tree_leaves_the_states_of_plain_decoding(
    target: PreTrainedModel, head: DraftHead, early_head: DraftHead, most: int
) -> None:
    wide = {"assistant_model": head, "policy": FixedPolicy(TreeShape(40, 3, 7))}
    ways = {}, wide, wide | {"assistant_model": early_head, "compile": True}
    plain, *others = (answer(target, tokens(9), max_new_tokens=most, **trees)[CACHE_KEYWORD] for trees in ways)
    for found in others:
        check_equal_caches(found, plain, most=1e-5)


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
def test_lookups_alone_give_the_text_of_plain_generate(target: PreTrainedModel) -> None:
    """The prompt holds what the target said after its end, so that chains are accepted."""
    policy = FixedPolicy(TreeShape(1, 0, 1, lookup=5))
    said = [answer(target, tokens(6, seed), max_new_tokens=12).sequences for seed in range(3)]
    check_counts(*(compare(target, None, torch.cat([text, text[:, :6]], dim=1), policy=policy) for text in said))


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
@pytest.mark.parametrize("has_head", [True, False], ids=["head", "lookups alone"])
def test_auto_gives_the_text_of_plain_generate(target: PreTrainedModel, head: DraftHead, has_head: bool) -> None:
    compare(target, head if has_head else None, tokens(9), policy="auto")


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
@pytest.mark.usefixtures("forwards")
def test_a_fault_in_the_middle_of_a_text_repeats_the_step_as_it_is(
    target: PreTrainedModel, early_head: DraftHead, caplog: pytest.LogCaptureFixture
) -> None:
    runs = list[int]()

    class Fails(AsItIs):
        def __call__(self, inputs: Any, buffers: Any = ()) -> Any:
            runs.append(1)
            if len(runs) == 3:
                raise RuntimeError("no memory")
            return super().__call__(inputs, buffers)

    target.speculation_state.slot_engine.__init__()
    with patch.object(slots, "CompiledFunction", Fails):
        compare(target, early_head, tokens(9), compile=True, policy=AnyShape(0))
    target.speculation_state.slot_engine.__init__()
    assert len(runs) == 3 and "no memory" in caplog.text
