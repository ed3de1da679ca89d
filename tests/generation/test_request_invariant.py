"""Where `invariant=True` may stand: in a call, in `attach` and in a `generation_config`, and what it means alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, detach
from transformers_resps.generation import mixin
from transformers_resps.generation.keywords import SpeculationDefaults
from transformers_resps.generation.request import Request


LOOKUP = FixedPolicy(TreeShape(1, 0, 1, lookup=4))
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What calls asked for that were not stock's."""
    seen: list[Request] = []
    plan = mixin.plan

    def watched(request: Request, *args: Any) -> Any:
        seen.append(request)
        return plan(request, *args)

    monkeypatch.setattr(mixin, "plan", watched)
    return seen


def modes(asked: list[Request]) -> list[bool]:
    """Whether each call ran in the mode, since this was last asked."""
    found = [request.invariant for request in asked]
    asked.clear()
    return found


def test_alone_it_is_plain_decoding_by_our_loop(model: Any, prompt: torch.Tensor, asked: list[Request]) -> None:
    model.generate(prompt, invariant=True, **SETTINGS)
    (request,) = asked
    assert request.invariant and not request.sources
    assert isinstance(request.policy, FixedPolicy) and request.policy.shape == TreeShape.plain()


def test_off_it_changes_nothing(model: Any, prompt: torch.Tensor, asked: list[Request]) -> None:
    for invariant in (False, None):
        assert not hasattr(model.generate(prompt, invariant=invariant, **SETTINGS), "speculation")
    assert not modes(asked)
    model.generate(prompt, policy=LOOKUP, invariant=False, **SETTINGS)
    assert modes(asked) == [False]


def test_a_default_holds_until_a_call_detach_or_new_defaults_say_otherwise(
    model: Any, head: DraftHead, prompt: torch.Tensor, asked: list[Request]
) -> None:
    attach(model, invariant=True)
    for call in ({}, {"policy": LOOKUP}, {"assistant_model": head}, {"policy": LOOKUP, "invariant": False}):
        model.generate(prompt, **call, **SETTINGS)
    assert modes(asked) == [True, True, True, False]
    assert copy.deepcopy(model).speculation_state.defaults == SpeculationDefaults(invariant=True)
    attach(model, policy=LOOKUP)
    model.generate(prompt, **SETTINGS)
    assert modes(asked) == [False]
    attach(detach(attach(model, invariant=True))).generate(prompt, **SETTINGS)
    assert not modes(asked)


def test_a_config_holds_before_a_default_and_a_keyword_before_both(
    model: Any, prompt: torch.Tensor, asked: list[Request]
) -> None:
    attach(model, policy=LOOKUP, invariant=False)
    model.generation_config.invariant = True
    model.generate(prompt, **SETTINGS)
    model.generate(prompt, invariant=False, **SETTINGS)
    model.generate(prompt, generation_config=GenerationConfig(invariant=False, **SETTINGS))
    assert modes(asked) == [True, False, False]


def test_a_config_with_it_is_saved_and_loaded(
    model: Any, prompt: torch.Tensor, asked: list[Request], tmp_path: Path
) -> None:
    model.generation_config.invariant = True
    model.save_pretrained(tmp_path)
    loaded = attach(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype))
    loaded.generate(prompt, **SETTINGS)
    assert modes(asked) == [True]


@pytest.mark.parametrize("given", [0, 1, "yes", torch.tensor(True)], ids=str)
def test_it_is_true_false_or_none(given: Any, model: Any, prompt: torch.Tensor) -> None:
    for call in (lambda: model.generate(prompt, invariant=given), lambda: attach(model, invariant=given)):
        with pytest.raises(ValueError, match="`invariant` must be True, False or None, got"):
            call()
    model.generation_config.invariant = given
    with pytest.raises(ValueError, match="`generation_config.invariant` is saved as JSON, so it must be a bool, got"):
        model.generate(prompt, **SETTINGS)


def test_a_plain_call_takes_it_from_nowhere(model: Any, prompt: torch.Tensor, asked: list[Request]) -> None:
    def again(target: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        return target.generate(input_ids, **SETTINGS)

    attach(model, policy=LOOKUP, invariant=True)
    model.generate(prompt, policy="plain", **SETTINGS)
    model.generate(prompt, policy="plain", custom_generate=again, **SETTINGS)
    with SpeculationDefaults.suspended():
        model.generate(prompt, **SETTINGS)
    model.generation_config.invariant = True
    model.generate(prompt, policy="plain", **SETTINGS)
    assert not modes(asked)


def test_with_plain_it_is_a_contradiction(model: Any, prompt: torch.Tensor) -> None:
    for call in ({"invariant": True}, {"generation_config": GenerationConfig(invariant=True, policy="plain")}):
        options = {"policy": "plain"} | call if "invariant" in call else call
        with pytest.raises(
            ValueError, match="contradiction, since stock decoding rounds otherwise. Leave out the pol"
        ):
            model.generate(prompt, **options, **SETTINGS)


def test_an_assistant_of_transformers_own_takes_none_and_is_refused_with_it(
    model: Any, prompt: torch.Tensor, asked: list[Request]
) -> None:
    assistant = detach(copy.deepcopy(model))
    with pytest.raises(ValueError, match="an assistant of Transformers' own, whose text depends .* `policy='auto'`"):
        model.generate(prompt, assistant_model=assistant, invariant=True, **SETTINGS)
    attach(model, invariant=True)
    model.generate(prompt, assistant_model=assistant, **SETTINGS)
    assert not modes(asked)
    model.generate(prompt, assistant_model=assistant, policy="auto", **SETTINGS)
    assert modes(asked) == [True]


def test_the_model_of_a_folder_is_such_an_assistant_too(
    model: Any, prompt: torch.Tensor, asked: list[Request], tmp_path: Path
) -> None:
    detach(copy.deepcopy(model)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an assistant of Transformers' own"):
        model.generate(prompt, assistant_model=tmp_path, invariant=True, **SETTINGS)
    attach(model, invariant=True).generate(prompt, assistant_model=tmp_path, **SETTINGS)
    assert not modes(asked)


def test_what_auto_learned_in_one_mode_is_not_what_it_knows_in_the_other(
    model: Any, prompt: torch.Tensor, asked: list[Request]
) -> None:
    for invariant in (True, False, True):
        model.generate(prompt, policy="auto", invariant=invariant, **SETTINGS)
    first, normal, again = (request.policy for request in asked)
    assert first is again and first is not normal
