"""What `attach` was given holds for every call that names nothing else, and for no longer than it should."""

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.decoding.rows import Noted
from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, assert_lossless, attach, calibrate, detach
from transformers_resps.generation.keywords import SpeculationDefaults
from transformers_resps.generation.mixin import ReSpSGenerationMixin
from transformers_resps.tools.doctor import write_answers
from transformers_resps.tools.inspect import examine
from transformers_resps.verifying.lending import evaluation_mode


LOOKUP = FixedPolicy(TreeShape(1, 0, 1, lookup=4))
REPORTED = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}


@contextmanager
def watched(model: Any, seen: set[bool]) -> Iterator[None]:
    """Note at every forward whether the model is in training mode."""
    hook = model.register_forward_pre_hook(lambda module, _: seen.add(module.training))
    try:
        yield
    finally:
        hook.remove()


def test_head_and_policy_hold_where_a_call_gives_none(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    plain = model.generate(prompt, **REPORTED)
    attach(model, assistant_model=head, policy=FixedPolicy(TreeShape(6, 2, 3)))
    drafted = model.generate(prompt, **REPORTED)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert max(step.verified for step in drafted.speculation.steps) == 6


def test_a_keyword_of_the_call_replaces_its_default_alone(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    attach(model, assistant_model=head, policy=FixedPolicy(TreeShape(6, 2, 3)))
    found = model.generate(prompt, policy=FixedPolicy(TreeShape(3, 1, 2)), **REPORTED)
    assert max(step.verified for step in found.speculation.steps) == 3 and found.speculation.tau >= 1


def test_attached_again_it_keeps_defaults_unless_new_ones_are_given(model: Any, prompt: torch.Tensor) -> None:
    attach(model, policy=LOOKUP)
    assert model.generate(prompt, **REPORTED).speculation is not None
    assert attach(model).speculation_state.defaults.policy is LOOKUP
    attach(model, lockstep=False)
    assert model.speculation_state.defaults == SpeculationDefaults(lockstep=False)


def test_detach_forgets_them(model: Any, prompt: torch.Tensor) -> None:
    detach(attach(model, policy=LOOKUP))
    assert not hasattr(attach(model).generate(prompt, **REPORTED), "speculation")


def test_detach_forgets_those_of_a_users_own_subclass_too(model: Any) -> None:
    base: Any = type(detach(model))

    class Own(ReSpSGenerationMixin, base):  # type: ignore[misc]  # of whichever class that is
        pass

    model.__class__ = Own
    detach(attach(model, policy=LOOKUP))
    assert type(model) is Own and model.speculation_state.defaults == SpeculationDefaults()


def test_other_threads_keep_them_while_they_are_suspended(model: Any, prompt: torch.Tensor) -> None:
    attach(model, policy=LOOKUP)

    def is_plain() -> bool:
        return not hasattr(model.generate(prompt, **REPORTED), "speculation")

    with SpeculationDefaults.suspended(), ThreadPoolExecutor(1) as others:
        assert is_plain() and not others.submit(is_plain).result()
    assert not is_plain()


def test_a_plain_call_is_stock_decoding(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    attach(model, assistant_model=head, policy="auto")
    plain = model.generate(prompt, policy="plain", **REPORTED)
    assert not hasattr(plain, "speculation")
    beams = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False}
    with pytest.raises(ValueError, match=r"num_beams=2.*policy='plain'"):
        model.generate(prompt, **beams)
    assert model.generate(prompt, policy="plain", **beams).shape[1] <= prompt.shape[1] + 6
    with pytest.raises(ValueError, match="decodes without a draft head. Leave out one"):
        model.generate(prompt, policy="plain", assistant_model=head)


def test_calls_within_a_plain_call_are_plain_too(model: Any, prompt: torch.Tensor) -> None:
    def again(target: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        return target.generate(input_ids, **REPORTED)

    attach(model, policy=LOOKUP)
    assert not hasattr(model.generate(prompt, policy="plain", custom_generate=again), "speculation")


def test_a_plain_call_runs_in_the_mode_of_the_model(model: Any, prompt: torch.Tensor) -> None:
    attach(model.train(), policy=LOOKUP, eval_mode=True)
    seen: set[bool] = set()
    with watched(model, seen):
        model.generate(prompt, max_new_tokens=2, policy="plain")
    assert seen == {True}


def test_an_assistant_of_transformers_own_takes_none(model: Any, prompt: torch.Tensor) -> None:
    assistant = detach(copy.deepcopy(model))
    expected = model.generate(prompt, assistant_model=assistant, **REPORTED)
    attach(model, policy=LOOKUP)
    found = model.generate(prompt, assistant_model=assistant, **REPORTED)
    assert found.sequences.tolist() == expected.sequences.tolist() and not hasattr(found, "speculation")


def test_a_sampled_batch_is_ragged_by_default(model: Any, prompt: torch.Tensor) -> None:
    rows = torch.stack([prompt[0], prompt[0].flip(0), torch.full_like(prompt[0], 9)])
    settings = {**REPORTED, "do_sample": True, "temperature": 0.02}
    together = attach(model, policy=LOOKUP).generate(rows, **settings).speculation
    apart = attach(model, policy=LOOKUP, lockstep=False).generate(rows, **settings).speculation
    assert apart.target_forwards < together.target_forwards
    assert not hasattr(attach(model, lockstep=False).generate(rows, **REPORTED), "speculation")


def test_the_head_of_a_call_replaces_the_default_head(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    other = copy.deepcopy(head)
    ran: list[DraftHead] = []
    for one in (head, other):
        one.fc.register_forward_hook(lambda *_, one=one: ran.append(one))
    attach(model, assistant_model=head).generate(prompt, assistant_model=other, max_new_tokens=4)
    assert ran and all(one is other for one in ran)


def test_what_cannot_be_a_default_is_refused_by_attach(model: Any, head: DraftHead) -> None:
    with pytest.raises(ValueError, match="There is no config.json in head/folder"):
        attach(model, assistant_model="head/folder")
    with pytest.raises(ValueError, match="takes a `DraftHead`.*pass other assistants to `generate`"):
        attach(model, assistant_model=model)
    with pytest.raises(ValueError, match="`policy` must be"):
        attach(model, policy=FixedPolicy)
    with pytest.raises(ValueError, match="'plain'. is no default"):
        attach(model, policy="plain")
    with pytest.raises(ValueError, match="`eval_mode` must be True or False, got 'no'"):
        attach(model, eval_mode="no")
    with pytest.raises(ValueError, match="hidden_size"):
        attach(Architecture("llama", {"hidden_size": 64}).build("sdpa"), assistant_model=head)
    assert model.speculation_state.defaults == SpeculationDefaults()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_them_too(duplicate: Any, model: Any, prompt: torch.Tensor) -> None:
    found = duplicate(attach(model, policy="auto")).generate(prompt, **REPORTED)
    assert found.speculation is not None


def test_they_reach_the_model_inside_an_adapter(model: Any, prompt: torch.Tensor) -> None:
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    assert attach(wrapped, policy=LOOKUP).generate(input_ids=prompt, **REPORTED).speculation is not None


def test_a_model_in_training_is_evaluated_for_the_call_alone(model: Any, prompt: torch.Tensor) -> None:
    lora = LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
    wrapped: Any = get_peft_model(model, lora)
    expected = wrapped.eval().generate(input_ids=prompt, **REPORTED).sequences
    wrapped.train()
    wrapped.base_model.model.model.layers[0].eval()
    modes = [module.training for module in wrapped.modules()]
    with pytest.raises(ValueError, match="training mode"):
        attach(wrapped, policy=LOOKUP).generate(input_ids=prompt, **REPORTED)
    found = attach(wrapped, policy=LOOKUP, eval_mode=True).generate(input_ids=prompt, **REPORTED)
    assert found.sequences.tolist() == expected.tolist()
    assert [module.training for module in wrapped.modules()] == modes


def test_the_head_is_evaluated_as_well(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    training = copy.deepcopy(head).train()
    attach(model, assistant_model=training, eval_mode=True)
    seen: set[bool] = set()
    with watched(training.layers[0], seen):
        model.generate(prompt, max_new_tokens=4)
    assert seen == {False} and training.training


def test_overlapping_calls_train_no_layer_of_each_other(model: Any) -> None:
    model.train()
    with evaluation_mode(model):
        with evaluation_mode(model):
            pass
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_the_mode_comes_back_after_an_error(model: Any, prompt: torch.Tensor) -> None:
    attach(model.train(), policy=LOOKUP, eval_mode=True)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(prompt, num_beams=2)
    assert all(module.training for module in model.modules())


def test_what_measures_a_model_leaves_them_aside(model: Any, head: DraftHead, prompt: torch.Tensor) -> None:
    counted = Noted(TreeShape(1, 0, 1, lookup=4))
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    attach(wrapped, assistant_model=head, policy=counted)
    tree = FixedPolicy(TreeShape(4, 2, 2))
    found = examine(wrapped, head, tree, prompt[0], settings={"max_new_tokens": 8})
    assert found.parts_at is None and not counted.steps
    calibrate(model, None, folder=None, refresh=True)
    write_answers(model, [prompt[0]], max_new_tokens=4)
    assert not counted.steps
    with pytest.raises(ValueError, match="'plain'. drafts nothing, so there is nothing to compare"):
        assert_lossless(model, None, "plain")


def test_the_proof_kit_leaves_them_aside_and_in_place(model: Any, head: DraftHead) -> None:
    attach(model, policy=LOOKUP)
    prompts = [torch.tensor([5, 7, 11, 3, 9, 7, 11])]
    report = assert_lossless(model, head, FixedPolicy(TreeShape(4, 2, 2)), prompts, seeds=1, max_new_tokens=4)
    assert report.is_lossless and isinstance(model, ReSpSGenerationMixin)
    assert model.speculation_state.defaults.policy is LOOKUP
