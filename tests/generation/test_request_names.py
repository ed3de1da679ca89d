"""Heads and policies by folder or Hub id, in a call, in `attach` and in a `generation_config`."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from tests.tokenizers import letter_tokenizer
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, TreeShape, attach, detach
from transformers_resps.generation.attach import attached, detached
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy


REPORTED = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def head_folder(head: DraftHead, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("named") / "head"
    head.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tree of six nodes."""
    folder = tmp_path_factory.mktemp("named") / "policy"
    FixedPolicy(TreeShape(6, 2, 3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were loaded."""
    seen: list[str] = []
    for cls in (DraftHead, AutoPolicy):
        loader: Callable[..., Any] = cls.from_pretrained

        def watched(name: str, *args: Any, loader: Callable[..., Any] = loader, **keywords: Any) -> Any:
            seen.append(str(name))
            return loader(name, *args, **keywords)

        monkeypatch.setattr(cls, "from_pretrained", watched)
    return seen


def widest(output: Any) -> int:
    return max(step.verified for step in output.speculation.steps)


def test_a_call_takes_folders_and_loads_each_once(
    model: Any, prompt: torch.Tensor, head_folder: str, policy_folder: str, loads: list[str]
) -> None:
    plain = model.generate(prompt, **REPORTED)
    for _ in range(2):
        found = model.generate(prompt, assistant_model=head_folder, policy=policy_folder, **REPORTED)
        assert found.sequences.tolist() == plain.sequences.tolist() and widest(found) == 6
    assert loads == [head_folder, policy_folder]
    model.generate(prompt, assistant_model=Path(head_folder), policy=Path(policy_folder), **REPORTED)
    assert loads == [head_folder, policy_folder], "a path is the same name"


def test_a_named_head_is_no_part_of_the_model(model: Any, prompt: torch.Tensor, head_folder: str) -> None:
    before = set(model.state_dict())
    model.generate(prompt, assistant_model=head_folder, max_new_tokens=3)
    assert set(model.state_dict()) == before
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


def test_detach_forgets_named_heads_and_detached_keeps_them(
    model: Any, prompt: torch.Tensor, head_folder: str, loads: list[str]
) -> None:
    call: dict[str, Any] = {"assistant_model": head_folder, "max_new_tokens": 3}
    model.generate(prompt, **call)
    with detached(model):
        pass
    model.generate(prompt, **call)
    assert len(loads) == 1
    detach(model)
    for _ in range(2):
        with attached(model):
            model.generate(prompt, **call)
    assert len(loads) == 2, "again after `detach`, and once for both calls"


def test_attach_loads_folders_at_once(
    model: Any, prompt: torch.Tensor, head_folder: str, policy_folder: str, loads: list[str]
) -> None:
    attach(model, assistant_model=head_folder, policy=policy_folder)
    assert loads == [policy_folder, head_folder]
    assert widest(model.generate(prompt, **REPORTED)) == 6
    model.generate(prompt, assistant_model=head_folder, **REPORTED)
    assert loads == [policy_folder, head_folder], "what `attach` has loaded is kept for calls that name it"
    with pytest.raises(ValueError, match="There is no config.json in head/folder"):
        attach(model, assistant_model="head/folder")


def test_the_generation_config_of_a_call_and_of_the_model_name_a_policy(
    model: Any, prompt: torch.Tensor, head: DraftHead, policy_folder: str, tmp_path: Path
) -> None:
    plain = model.generate(prompt, **REPORTED)
    GenerationConfig(policy=policy_folder, lockstep=False, **REPORTED).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    found = model.generate(prompt, assistant_model=head, generation_config=loaded)
    assert found.sequences.tolist() == plain.sequences.tolist() and widest(found) == 6
    attach(model, assistant_model=head, policy=FixedPolicy(TreeShape(3, 1, 2)))
    assert widest(model.generate(prompt, **REPORTED)) == 3
    model.generation_config = loaded
    assert widest(model.generate(prompt)) == 6, "the config's holds before what `attach` was given"
    small = FixedPolicy(TreeShape(2, 1, 1))
    assert widest(model.generate(prompt, policy=small)) == 2, "the call's keyword holds before both"
    model.save_pretrained(tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").policy == policy_folder


def test_a_config_may_say_auto_and_its_rows_may_be_ragged(model: Any, prompt: torch.Tensor) -> None:
    rows = torch.stack([prompt[0], prompt[0].flip(0), torch.full_like(prompt[0], 9)])
    settings = {**REPORTED, "do_sample": True, "temperature": 0.02}
    forwards = []
    for lockstep in (True, False):
        attach(model, policy=FixedPolicy(TreeShape(1, 0, 1, lookup=4)))
        model.generation_config.lockstep = lockstep
        forwards.append(model.generate(rows, **settings).speculation.target_forwards)
    assert forwards[1] < forwards[0]
    model.generation_config.policy = "auto"
    assert detach(copy.deepcopy(model)).generate(prompt, max_new_tokens=3).shape[1] == prompt.shape[1] + 3
    assert model.generate(prompt, **REPORTED).speculation is not None


@pytest.mark.parametrize(
    "saved", [{"policy": "auto", "lockstep": False}, {"policy": "plain"}, {"lockstep": True}], ids=str
)
def test_what_a_models_own_config_says_survives_saving(model: Any, tmp_path: Path, saved: dict[str, Any]) -> None:
    """Also where the config began as a copy of the model's, of which Transformers loads only what it knows."""
    attach(model)
    assert model.generation_config._from_model_config
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert {name: getattr(loaded, name) for name in saved} == saved


def test_a_config_that_says_nothing_is_saved_as_it_was(model: Any, tmp_path: Path) -> None:
    attach(model).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config._from_model_config


def test_lockstep_in_a_config_waits_for_a_call_that_speculates(model: Any, prompt: torch.Tensor) -> None:
    attach(model).generation_config.lockstep = False
    assert not hasattr(model.generate(prompt, **REPORTED), "speculation")
    assert model.generate(prompt, policy="auto", **REPORTED).speculation is not None


def test_plain_in_a_config_or_a_call_is_stock_decoding(model: Any, prompt: torch.Tensor, head_folder: str) -> None:
    attach(model, policy="auto")
    found = model.generate(prompt, generation_config=GenerationConfig(policy="plain", **REPORTED))
    assert not hasattr(found, "speculation")
    model.generation_config.policy, model.generation_config.lockstep = "auto", False
    assert not hasattr(model.generate(prompt, policy="plain", **REPORTED), "speculation")
    with pytest.raises(ValueError, match="decodes without a draft head. Leave out one"):
        model.generate(prompt, policy="plain", assistant_model=head_folder)


def test_an_assistant_of_transformers_own_takes_none_of_a_config(model: Any, prompt: torch.Tensor) -> None:
    model.generation_config.policy = "auto"
    assistant = detach(copy.deepcopy(model))
    found = model.generate(prompt, assistant_model=assistant, **REPORTED)
    assert not hasattr(found, "speculation")


def test_an_object_in_a_config_is_refused_by_name(model: Any, prompt: torch.Tensor) -> None:
    for name, value, needed in (("policy", FixedPolicy(TreeShape(3, 1, 2)), "str"), ("lockstep", "no", "bool")):
        with pytest.raises(ValueError, match=f"`generation_config.{name}` is saved as JSON, so it must be a {needed}"):
            model.generate(prompt, generation_config=GenerationConfig(**{name: value}))


def test_a_mistyped_word_is_refused_without_asking_the_hub(model: Any, prompt: torch.Tensor, loads: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`policy` must be 'auto', 'plain', a folder, a Hub id .*got 'atuo'"):
        model.generate(prompt, policy="atuo")
    assert not loads
    with pytest.raises(ValueError, match="you/atuo is neither a local folder nor a repository"):
        model.generate(prompt, policy="you/atuo")


def test_a_named_policy_is_checked_as_an_object_is(
    model: Any, prompt: torch.Tensor, head_folder: str, policy_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"FixedPolicy\(6/2/3\) shapes the trees of a draft head, and the call has no"
    ):
        model.generate(prompt, policy=policy_folder)
    config = ReSpSConfig(feature_size=96, target={"vocab_size": 7})
    ReSpSPolicy(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it needs vocab_size 7"):
        model.generate(prompt, assistant_model=head_folder, policy=str(tmp_path))


def test_a_pipeline_passes_names_on_with_each_call(model: Any, head_folder: str, policy_folder: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    pipe = pipeline("text-generation", model=model, tokenizer=letter_tokenizer())
    plain = pipe("bdfh", **options)
    assert pipe("bdfh", assistant_model=head_folder, policy=policy_folder, **options) == plain
    attach(model, assistant_model=head_folder, policy=policy_folder)
    assert pipe("bdfh", **options) == plain
