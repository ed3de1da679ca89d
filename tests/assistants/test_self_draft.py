"""A target that drafts for itself by weights of 4 bits: the rounded model's picks, the target's text."""

import copy
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tests.compilation.test_few_bits import quantized
from tests.kernels import needs_compiler
from tests.targets import VOCABULARY, Architecture
from transformers_resps import FixedPolicy, TreeShape, attach
from transformers_resps.assistants import SelfDraft
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.compilation.few_bits import (
    Codes,
    few_bits,
    few_bits_weight,
    numbers,
    rounded_codes,
    rounding,
    rounding_scales,
)
from transformers_resps.compilation.kernels import reads_few_bits
from transformers_resps.compilation.packages import FOLDER_VARIABLE
from transformers_resps.verifying.slots.steps import RoundedSteps


needs_lookups = pytest.mark.skipif(not reads_few_bits(), reason="asks for AVX512-BF16 and AVX512-VBMI")
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}


def built(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    return Architecture(model_type, SIZES | changes).build("sdpa").bfloat16()


def decoded(target: PreTrainedModel, *, rounds: bool) -> PreTrainedModel:
    """Return a copy in float32; with `rounds`, with the weights that the drafts are made with."""
    made = copy.deepcopy(target)
    for layer in made.modules():
        found = few_bits(layer)
        weight = getattr(layer, "weight", None) if found is None else few_bits_weight(*found.read(), found.kind)
        if rounds and isinstance(layer, nn.Linear):
            kind, groups = rounding(weight, 4)
            codes, scales = rounded_codes(weight, kind, groups), rounding_scales(weight, kind, groups)
            weight = (numbers(codes, Codes.INT4).unflatten(1, (groups, -1)) * scales[..., None]).flatten(1)
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return made.float()


@needs_lookups
@needs_compiler
@pytest.mark.parametrize("has_int8", [False, True])
def test_drafts_are_those_of_the_rounded_weights_over_the_targets_own_keys(
    has_int8: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    target = attach(quantized("int8") if has_int8 else built(), compile=True)
    seen = list[tuple[int, list[int], Tensor]]()
    logits_of = RoundedSteps.logits

    def logits(steps: RoundedSteps, tokens: Tensor, level: int) -> Tensor:
        found = logits_of(steps, tokens, level)
        before = [] if level == 0 else seen[-1][1]
        seen.append((steps._texts.places[0], [*before, int(tokens[0])], found[0]))
        return found

    monkeypatch.setattr(RoundedSteps, "logits", logits)
    prompt = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "compile": True}
    plain = target.generate(prompt, **settings, invariant=True)
    seen.clear()
    out = target.generate(
        prompt, **settings, assistant_model="self", policy=FixedPolicy(TreeShape(7, 3, 2)), invariant=True
    )
    assert torch.equal(out.sequences, plain.sequences)
    assert len({length for length, _, _ in seen}) < 20, "nearly nothing was accepted"
    exact, rounded, text = decoded(target, rounds=False), decoded(target, rounds=True), out.sequences
    errors = list[float]()
    for length, tokens, found in seen:
        cache = DynamicCache()
        with torch.no_grad():
            exact(text[:, :length], **{CACHE_KEYWORD: cache})
            unrounded, expected = (
                model(torch.tensor([tokens]), **{CACHE_KEYWORD: copy.deepcopy(cache)}).logits[0, -1]
                for model in (exact, rounded)
            )
        error = (found - expected).norm()
        assert error < 0.5 * (found - unrounded).norm()
        errors.append(float(error / expected.norm()))
    *most, worst = sorted(errors)
    assert max(most) < 0.1 and median(errors) < 0.05 and worst < 0.15  # layers round as eager bfloat16 does


@needs_lookups
@needs_compiler
def test_a_batch_drafts_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layer, since a whole program is compiled once, and one with several in parts."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    target = attach(built("qwen2", num_hidden_layers=1), compile=True)
    prompts, mask = torch.randint(1, VOCABULARY, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "return_dict_in_generate": True, "invariant": True}
    for do_sample in (False, True):
        out = []
        for drafting in ({}, {"assistant_model": "self", "policy": FixedPolicy(TreeShape(7, 3, 2))}):
            torch.manual_seed(3)
            out.append(target.generate(prompts, do_sample=do_sample, compile=True, **settings, **drafting))
        assert torch.equal(out[0].sequences, out[1].sequences)


def test_a_target_in_float32_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cannot draft for itself.*its dtype is torch.float32.*Pass a head"):
        attach(built().float()).generate(torch.tensor([[5, 7]]), assistant_model="self", policy="auto", compile=True)


@needs_lookups
def test_eager_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="drafts with compiled code, and steps are not compiled.*Pass `compile=True`"):
        attach(built()).generate(torch.tensor([[5, 7]]), assistant_model="self", policy="auto", max_new_tokens=2)


@needs_lookups
def test_a_target_of_4_bits_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    target = built()
    quantization.quantize_(target, quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)))
    with pytest.raises(ValueError, match="its weights have 4 bits already"):
        SelfDraft(target)
