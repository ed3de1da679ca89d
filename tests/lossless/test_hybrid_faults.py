"""Calls on hybrids that are cut, adapters, threads, caches from elsewhere: the plain text, and a clean model."""

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tests.caches import check_equal_caches
from tests.compilation.as_it_is import compiled_as_it_is
from tests.lossless.answering import Raises, in_threads
from tests.lossless.hybrids import SAMPLED, AnyShape, answer, check_counts, compare, tokens
from tests.recurrent_targets import NEEDS_STATES, recurrent
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.hybrids import known_mixers


pytestmark = NEEDS_STATES
WIDE = FixedPolicy(TreeShape(30, 3, 7))
FAMILIES = recurrent("qwen3_next", "kimi_linear", "nemotron_h", "zamba2", "lfm3")


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return attach(request.param.build())


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    head = DraftHead.from_target(target)
    answer(target, tokens(3), assistant_model=head, max_new_tokens=2)  # the first call probes the target
    return head


def hooks_and_settings(target: nn.Module) -> list[Any]:
    """What may not stay in a module after a call: its hooks, a forward of its own, and changed numbers."""
    kept = []
    for module in target.modules():
        kept.append([list(module._forward_hooks), list(module._forward_pre_hooks), "forward" in vars(module)])
        kept.append({name: value for name, value in vars(module).items() if isinstance(value, int | float | tuple)})
    return kept


class Fails(StoppingCriteria):
    """At the n-th token."""

    def __init__(self, uses: int) -> None:
        self.uses = uses

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.uses -= 1
        if not self.uses:
            raise ZeroDivisionError
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("uses", [1, 2, 5])
def test_a_criterion_that_raises_leaves_the_model_as_it_was(
    target: PreTrainedModel, head: DraftHead, uses: int
) -> None:
    before = hooks_and_settings(target)
    criteria = StoppingCriteriaList([Fails(uses)])
    with pytest.raises(ZeroDivisionError):
        answer(target, tokens(6), assistant_model=head, policy=WIDE, stopping_criteria=criteria)
    assert hooks_and_settings(target) == before
    compare(target, head, tokens(6))


def test_a_mixer_that_raises_in_a_tree_leaves_the_model_as_it_was(target: PreTrainedModel, head: DraftHead) -> None:
    mixer, calls = list(known_mixers(target).values())[-1], []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError

    handle = mixer.register_forward_hook(fail)
    before = hooks_and_settings(target)
    with pytest.raises(ZeroDivisionError):
        answer(target, tokens(6), assistant_model=head, policy=WIDE)
    assert hooks_and_settings(target) == before
    handle.remove()
    compare(target, head, tokens(6))


@pytest.mark.parametrize("uses", [1, 4, 6, 7])
@pytest.mark.parametrize("policy", [WIDE, FixedPolicy(TreeShape.plain())], ids=["trees", "plain steps"])
@pytest.mark.parametrize("compiles", [False, True], ids=["as it is", "compiled"])
def test_a_call_that_was_interrupted_leaves_the_model_as_it_was_and_a_cache_to_go_on_from(
    target: PreTrainedModel, head: DraftHead, compiles: bool, uses: int, policy: Any
) -> None:
    prompt, cache = tokens(6), DynamicCache(config=target.config.get_text_config(decoder=True))
    whole = answer(target, prompt, output_hidden_states=True).sequences  # which Transformers notes in the model
    before = hooks_and_settings(target)
    if compiles:
        head = DraftHead.from_target(target, feature_layers=[0, 1])
    options = {CACHE_KEYWORD: cache, "logits_processor": LogitsProcessorList([Raises(uses)]), "compile": compiles}
    with compiled_as_it_is(), pytest.raises(KeyboardInterrupt):
        target.generate(prompt, assistant_model=head, policy=policy, max_new_tokens=14, **options)
    assert hooks_and_settings(target) == before
    kept = int(cache.get_seq_length())
    assert prompt.shape[1] <= kept < prompt.shape[1] + uses
    found = answer(target, whole[:, : kept + 1], max_new_tokens=4, **{CACHE_KEYWORD: cache})
    assert found.sequences.tolist() == whole[:, : kept + 5].tolist()
    unbroken = answer(target, prompt, max_new_tokens=kept + 5 - prompt.shape[1])
    check_equal_caches(cache, unbroken[CACHE_KEYWORD], most=1e-5)


@pytest.mark.parametrize("target", recurrent("qwen3_next", "kimi_linear", "nemotron_h"), ids=str, indirect=True)
def test_adapters_on_mixers_give_their_own_plain_text(target: PreTrainedModel, head: DraftHead) -> None:
    names = sorted(
        {
            name
            for mixer in known_mixers(target).values()
            for name, part in mixer.named_modules()
            if type(part) is nn.Linear and name != "out_proj"
        }
    )
    own = copy.deepcopy(target)
    plain = answer(own, tokens(6)).sequences
    adapted = get_peft_model(own, LoraConfig(target_modules=names, init_lora_weights=False)).eval()
    assert answer(adapted, tokens(6)).sequences.tolist() != plain.tolist()
    for options in ({}, SAMPLED):
        check_counts(compare(adapted, head, tokens(6), **options), in_a_row=1)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_left_on_changes_nothing(
    target: PreTrainedModel, head: DraftHead, training: bool
) -> None:
    own = copy.deepcopy(target).train(training)
    own.gradient_checkpointing_enable()
    compare(own, head, tokens(6))


def test_threads_share_a_hybrid(target: PreTrainedModel, head: DraftHead) -> None:
    expected = [answer(target, tokens(5 + caller)).sequences.tolist() for caller in range(4)]
    trees = [{"assistant_model": head, "policy": AnyShape(caller)} if caller % 2 else {} for caller in range(4)]
    calls = [partial(target.generate, tokens(5 + caller), max_new_tokens=14, **trees[caller]) for caller in range(4)]
    assert [found.tolist() for found in in_threads(*calls)] == expected


def test_a_plain_forward_of_another_thread_sees_nothing_of_a_tree(target: PreTrainedModel, head: DraftHead) -> None:
    """It runs while a mixer reads a tree."""
    prompt, found = tokens(9, 3), list[Any]()
    with torch.no_grad():
        expected = target(input_ids=prompt, use_cache=False).logits
    is_nested = threading.local()

    def read_elsewhere(*_: Any) -> None:
        if getattr(is_nested, "on", False):
            return

        def read() -> None:
            is_nested.on = True
            with torch.no_grad():
                found.append(target(input_ids=prompt, use_cache=False).logits)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    mixer = list(known_mixers(target).values())[-1]
    inner = next(part for part in mixer.modules() if isinstance(part, nn.Linear))
    handle = inner.register_forward_hook(read_elsewhere)
    answer(target, tokens(6), assistant_model=head, policy=WIDE, max_new_tokens=4)
    handle.remove()
    assert len(found) > 1
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_cache_that_its_owner_could_not_crop_still_goes_on(target: PreTrainedModel, head: DraftHead) -> None:
    """Stock raises, since states cannot be taken back; what other layers held before is there."""
    first = answer(target, tokens(6))
    cache = first[CACHE_KEYWORD]
    if type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer":
        return
    with pytest.raises(RuntimeError):
        cache.crop(-2)
    text = torch.cat([first.sequences, tokens(3)], dim=1)
    plain = answer(target, text, **{CACHE_KEYWORD: copy.deepcopy(cache)})
    found = answer(target, text, assistant_model=head, policy=WIDE, **{CACHE_KEYWORD: cache})
    assert found.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("target", recurrent("lfm2", "lfm3"), ids=str, indirect=True)
@pytest.mark.parametrize("crops", [0, 3])
def test_convolution_states_that_their_owner_recorded_and_cropped_go_on(
    target: PreTrainedModel, head: DraftHead, crops: int
) -> None:
    """They keep more than a step needs until they are cropped."""
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    with torch.no_grad():
        target(input_ids=tokens(9), use_cache=True, **{CACHE_KEYWORD: cache})
    if crops:
        cache.crop(-crops)
    text = torch.cat([tokens(9)[:, : 9 - crops], tokens(3, 1)], dim=1)
    plain = answer(target, text)
    found = answer(target, text, assistant_model=head, policy=WIDE, **{CACHE_KEYWORD: cache})
    assert found.sequences.tolist() == plain.sequences.tolist()
