"""Compiled steps of targets with recurrent layers: every tree gives the texts and states of plain `generate`."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from tests.caches import check_equal_caches
from tests.compilation.as_it_is import AsItIs, compiled_as_it_is
from tests.lossless.hybrids import SAMPLED, AnyShape, answer, check_counts, compare, padded, tokens
from tests.lossless.test_continuing import Interrupts
from tests.lossless.test_hybrid_faults import hooks_and_settings
from tests.lossless.test_hybrids import BATCHES, OPTIONS, check_three_turns
from tests.recurrent_targets import NEEDS_STATES, RECURRENT, recurrent
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.slots import engine as slots


pytestmark = NEEDS_STATES
FAMILIES = recurrent("qwen3_next", "kimi_linear", "falcon_h1-clamped", "lfm3")
WIDE = FixedPolicy(TreeShape(30, 3, 7))
POLICIES = {
    "plain": FixedPolicy(TreeShape.plain()),
    "chain": FixedPolicy(TreeShape(6, 5, 1)),
    "tree": WIDE,
    "lookup": FixedPolicy(TreeShape(1, 0, 1, lookup=5)),
    "auto": "auto",
}


@pytest.fixture(autouse=True)
def forwards() -> Iterator[list[tuple[torch.Size, torch.Size]]]:
    """Shapes of tokens and logits of each compiled forward."""
    with compiled_as_it_is() as noted:
        yield noted


@pytest.fixture(scope="module", params=RECURRENT, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return attach(request.param.build())


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    """Reads no output of the last layer, which compiled code does not give."""
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0, 1])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_text_of_plain_generate(
    name: str, target: PreTrainedModel, head: DraftHead, forwards: list[Any]
) -> None:
    report = compare(target, head, tokens(9), compile=True, **OPTIONS[name])
    check_counts(report, in_a_row=1)
    assert len(forwards) == report.target_forwards - 1, "the prompt is read as it is"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_gives_the_text_of_plain_generate(
    name: str, target: PreTrainedModel, head: DraftHead, forwards: list[Any]
) -> None:
    for text in (tokens(9), tokens(6, 1)):
        compare(target, head, text, policy=POLICIES[name], compile=True)
    assert forwards and all(shape[1] >= 4 for shape, _ in forwards), "so few nodes are filled up"


@pytest.mark.parametrize("name", BATCHES)
def test_a_padded_batch_gives_the_texts_of_plain_generate(
    name: str, target: PreTrainedModel, head: DraftHead, forwards: list[Any]
) -> None:
    compare(target, head, padded(3), compile=True, **BATCHES[name])
    assert forwards


@pytest.mark.parametrize("rows", [1, 3])
def test_three_turns_each_go_on_from_the_states_of_the_last(
    target: PreTrainedModel, head: DraftHead, rows: int
) -> None:
    check_three_turns(target, head, rows, compile=True)


@pytest.mark.parametrize("most", [1, 3])
def test_a_call_that_ends_in_the_middle_of_a_tree_leaves_the_states_of_plain_decoding(
    target: PreTrainedModel, head: DraftHead, most: int
) -> None:
    wide = {"assistant_model": head, "policy": WIDE, "compile": True}
    plain, found = (answer(target, tokens(9), max_new_tokens=most, **trees)[CACHE_KEYWORD] for trees in ({}, wide))
    check_equal_caches(found, plain, most=1e-5)


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
@pytest.mark.parametrize("uses", [1, 4, 6])
@pytest.mark.parametrize("name", ["plain", "tree"])
def test_a_call_that_was_interrupted_leaves_the_model_as_it_was_and_a_cache_to_go_on_from(
    target: PreTrainedModel, head: DraftHead, uses: int, name: str
) -> None:
    prompt, cache = tokens(6), DynamicCache(config=target.config.get_text_config(decoder=True))
    whole = answer(target, prompt, output_hidden_states=True).sequences  # which Transformers notes in the model
    before = hooks_and_settings(target)
    options = {CACHE_KEYWORD: cache, "logits_processor": LogitsProcessorList([Interrupts(uses)]), "compile": True}
    with pytest.raises(KeyboardInterrupt):
        target.generate(prompt, assistant_model=head, policy=POLICIES[name], max_new_tokens=14, **options)
    assert hooks_and_settings(target) == before
    kept = cache.get_seq_length()
    assert prompt.shape[1] <= kept < prompt.shape[1] + uses
    found = answer(target, whole[:, : kept + 1], max_new_tokens=4, **{CACHE_KEYWORD: cache})
    assert found.sequences.tolist() == whole[:, : kept + 5].tolist()
    unbroken = answer(target, prompt, max_new_tokens=kept + 5 - prompt.shape[1])
    check_equal_caches(cache, unbroken[CACHE_KEYWORD], most=1e-5)


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
def test_a_fault_in_the_middle_of_a_text_repeats_the_step_as_it_is(
    target: PreTrainedModel, head: DraftHead, caplog: pytest.LogCaptureFixture
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
        compare(target, head, tokens(9), compile=True, policy=AnyShape(0))
    target.speculation_state.slot_engine.__init__()
    assert len(runs) == 3 and "no memory" in caplog.text


@pytest.mark.parametrize("target", FAMILIES, ids=str, indirect=True)
def test_sampled_texts_of_the_second_call_are_those_of_plain_generate(
    target: PreTrainedModel, head: DraftHead
) -> None:
    for seed in (1, 2):
        compare(target, head, tokens(9), seed, compile=True, **SAMPLED)
