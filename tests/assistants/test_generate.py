"""`generate` with Gemma 4's assistants and small models: the tokens of plain decoding, whoever drafts."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from tests.assistants.gemma import KINDS, gemma_assistant, gemma_target
from tests.targets import ARCHITECTURES, VOCABULARY
from transformers_resps import FixedPolicy, Observation, Policy, TreeShape, attach, detach
from transformers_resps.drafting import DraftSource
from transformers_resps.verifying.growing import TreeVerifier


PROMPTS = torch.tensor([[0, 0, 0, 5, 6, 7, 1, 2], [1, 2, 3, 4, 5, 9, 8, 7], [0, 3, 3, 3, 9, 3, 3, 3]])
MASK = (PROMPTS != 0).long()


class ChangingPolicy(Policy):
    """A wide tree, a chain, a plain step and another tree in turn."""

    def __init__(self) -> None:
        self.shapes = [TreeShape(40, 3, VOCABULARY), TreeShape(4, 3, 1), TreeShape.plain(), TreeShape(9, 2, 3)] * 50

    def choose(self, observation: Observation) -> TreeShape:
        return self.shapes.pop(0)


def built(name: str) -> PreTrainedModel:
    return next(found for found in ARCHITECTURES if str(found) == name).build("sdpa")


def noisy(model: PreTrainedModel) -> PreTrainedModel:
    """Drafts often, not always, what the model picks."""
    small = copy.deepcopy(model)
    torch.manual_seed(5)
    for parameter in small.parameters():
        parameter.data += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return small


def check_equal(target: Any, assistant: Any) -> float:
    """Greedy and sampled, alone and in batches that are padded, ragged or in lockstep; the mean of tau."""
    taus = []
    for rows, settings in (
        ([1], {"do_sample": False}),
        ([1], {"do_sample": True}),
        ([0, 1, 2], {"do_sample": False}),
        ([0, 1, 2], {"do_sample": True}),
        ([0, 1, 2], {"do_sample": False, "lockstep": True}),
    ):
        inputs = {"input_ids": PROMPTS[rows], "attention_mask": MASK[rows], "max_new_tokens": 14}
        set_seed(3)
        expected = target.generate(**inputs, do_sample=settings["do_sample"])
        set_seed(3)
        asked = {"assistant_model": assistant, "policy": ChangingPolicy(), "return_dict_in_generate": True}
        found = target.generate(**inputs, **settings, **asked)
        assert found.sequences.tolist() == expected.tolist()
        taus.append(found.speculation.tau)
    return sum(taus) / len(taus)


@pytest.mark.parametrize(("window", "centroids"), [(8, False), (64, True)], ids=["window", "centroids"])
def test_a_gemma_assistant_changes_no_token(window: int, centroids: bool) -> None:
    target = attach(gemma_target(sliding_window=window))
    assert check_equal(target, gemma_assistant(sliding_window=window, centroids=centroids)) > 1


def test_the_targets_keys_are_laid_out_once_for_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    target, handed_out, entries = attach(gemma_target()), list[int](), TreeVerifier.target_entries

    def counted(self: TreeVerifier) -> Any:
        handed_out.append(self.length)
        return entries(self)

    monkeypatch.setattr(TreeVerifier, "target_entries", counted)
    asked = {"policy": FixedPolicy(TreeShape(8, 3, 2)), "return_dict_in_generate": True, "max_new_tokens": 12}
    target.generate(PROMPTS[1:2], assistant_model=gemma_assistant(), **asked)
    assert handed_out and len(set(handed_out)) == len(handed_out)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3_text", "gpt2", "qwen3_moe"])
def test_a_small_model_changes_no_token_and_is_believed(name: str) -> None:
    target = attach(built(name))
    assert check_equal(target, noisy(target)) > 1.2


def test_a_small_model_of_another_architecture_changes_no_token() -> None:
    assert check_equal(attach(built("llama")), built("gpt2").float()) > 1


def source_of(target: Any, assistant: PreTrainedModel) -> DraftSource:
    found: DraftSource = target.speculation_state.assistants.load(target, assistant, as_source=True)
    return found


@pytest.mark.parametrize("kind", ["gemma", "causal"])
def test_auto_uses_an_assistant_and_keeps_what_it_learned(kind: str) -> None:
    target = attach(gemma_target() if kind == "gemma" else built("llama").float())
    assistant = gemma_assistant() if kind == "gemma" else noisy(target)
    inputs = {"input_ids": PROMPTS[1:2], "max_new_tokens": 40}
    expected = target.generate(**inputs, do_sample=False)
    for _ in range(2):
        found = target.generate(**inputs, do_sample=False, assistant_model=assistant, policy="auto")
        assert found.tolist() == expected.tolist()
    assert source_of(target, assistant) is source_of(target, assistant)


def test_a_source_lives_as_long_as_its_model() -> None:
    target, small = attach(built("llama")), built("gpt2").double()
    target.generate(PROMPTS[1:2], max_new_tokens=4, assistant_model=small, policy=FixedPolicy(TreeShape(6, 2, 3)))
    source = weakref.ref(source_of(target, small))
    assert source() is not None
    del small
    gc.collect()
    assert source() is None


def test_without_a_policy_assisted_decoding_stays_transformers_own() -> None:
    target = attach(built("llama"))
    small = noisy(target)
    for model, assistant in ((target, small), (attach(gemma_target()), gemma_assistant())):
        asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        found = model.generate(PROMPTS[1:2], assistant_model=assistant, **asked)
        assert not hasattr(found, "speculation")


def test_an_assistant_is_named_by_its_folder(tmp_path: Path) -> None:
    """Which is loaded once, and is Transformers' own without a policy."""
    target = attach(gemma_target())
    noisy(target).save_pretrained(tmp_path / "small")
    gemma_assistant().save_pretrained(tmp_path / "gemma")
    asked = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    expected = target.generate(PROMPTS[1:2], **asked).sequences.tolist()
    for name in ("small", "gemma"):
        for _ in range(2):
            shape = FixedPolicy(TreeShape(9, 2, 4))
            found = target.generate(PROMPTS[1:2], assistant_model=tmp_path / name, policy=shape, **asked)
            assert found.sequences.tolist() == expected and found.speculation.steps[1].drafted > 0
        assert not hasattr(target.generate(PROMPTS[1:2], assistant_model=str(tmp_path / name), **asked), "speculation")
    attach(target, assistant_model=tmp_path / "small", policy=FixedPolicy(TreeShape(9, 2, 4)))
    assert target.generate(PROMPTS[1:2], **asked).speculation.steps[1].drafted > 0


def test_several_models_draft_one_tree_without_a_policy_too() -> None:
    target = attach(gemma_target())
    asked = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    found = target.generate(PROMPTS[1:2], assistant_model=[noisy(target), gemma_assistant()], **asked)
    assert found.sequences.tolist() == target.generate(PROMPTS[1:2], **asked).sequences.tolist()
    assert sum(step.accepted_total for step in found.speculation.steps) > 0


def test_a_model_that_does_not_fit_is_no_default() -> None:
    target = built("llama")
    with pytest.raises(ValueError, match="drafts for Gemma 4 alone"):
        attach(target, assistant_model=gemma_assistant(), policy="auto")
    assert detach(target) is target


def test_an_assistant_that_draws_is_refused_and_held_in_evaluation_mode() -> None:
    target = built("llama")
    small = noisy(target).train()
    small.config.attention_dropout = 0.5
    for layer in small.model.layers:
        layer.self_attn.attention_dropout = 0.5
    asked = {"max_new_tokens": 6, "do_sample": False, "policy": FixedPolicy(TreeShape(9, 2, 4))}
    with pytest.raises(ValueError, match="is in training mode, where its layer .* draws"):
        attach(target).generate(PROMPTS[1:2], assistant_model=small, **asked)
    found = attach(target, eval_mode=True).generate(PROMPTS[1:2], assistant_model=small, **asked)
    assert found.tolist() == target.generate(PROMPTS[1:2], max_new_tokens=6, do_sample=False).tolist()
    assert small.training


def exact(target: Any, prompt: Tensor) -> Tensor:
    """Of the first two tokens after a prompt `[1, s]`, the probability `[v * v]`."""
    with torch.no_grad():
        first = target(input_ids=prompt).logits[0, -1].softmax(-1)
        longer = torch.cat([prompt.expand(len(first), -1), torch.arange(len(first))[:, None]], dim=1)
        return (first[:, None] * target(input_ids=longer).logits[:, -1].softmax(-1)).flatten()


def p_value(found: Tensor, probs: Tensor) -> float:
    """Of chi-square over pairs of tokens `[n, 2]`; those of which fewer than five are expected count as one."""
    counts = torch.bincount(found[:, 0] * int(len(probs) ** 0.5) + found[:, 1], minlength=len(probs)).double()
    expected = probs.double() * len(found)
    rare = expected < 5
    counts, expected = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, expected))
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), chi_square / 2))


def test_transformers_samples_with_a_bias_that_a_tree_does_not_have() -> None:
    """Its own loop drafts the likeliest token, and accepts it as if it had been drawn."""
    small: dict[str, Any] = {"vocab_size": 4, "initializer_range": 0.15}
    layers = {"num_hidden_layers": 2, "layer_types": KINDS, "num_kv_shared_layers": 0}
    target: Any = attach(gemma_target(**small, **layers, hidden_size_per_layer_input=0))
    assistant: Any = gemma_assistant(**small)
    prompt, probs = torch.tensor([[1, 2, 3, 1]]), exact(target, torch.tensor([[1, 2, 3, 1]]))
    asked = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "assistant_model": assistant}
    set_seed(0)
    stock = [target.generate(prompt, **asked)[:, 4:6] for _ in range(120)]
    policy = FixedPolicy(TreeShape(8, 2, 3))
    ours = [target.generate(prompt, **asked, policy=policy, num_return_sequences=300)[:, 4:6] for _ in range(2)]
    assert p_value(torch.cat(stock), probs) < 1e-6
    assert p_value(torch.cat(ours)[:120], probs) > 1e-3
    assert p_value(torch.cat(ours), probs) > 1e-3
