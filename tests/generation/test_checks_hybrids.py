"""Recurrent targets that cannot verify trees, and what a hybrid's call cannot have: refused with the reason."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.lossless.hybrids import answer, tokens
from tests.recurrent_targets import NEEDS_STATES, recurrent
from tests.targets import Architecture
from transformers_resps import FixedPolicy, TreeShape, attach
from transformers_resps.verifying import hybrids as known_mixers


pytestmark = NEEDS_STATES
TREES = FixedPolicy(TreeShape(12, 3, 3))
_HALF = ["linear_attention", "full_attention"] * 2
_MAMBA_1 = "has Mamba-1 layers, whose scan of several tokens starts without the state before them"
_STATES = {"mamba_d_state": 8, "mamba_d_conv": 4, "use_mamba_kernels": False}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 8}, _MAMBA_1),
    "falcon_mamba": ({"state_size": 8}, _MAMBA_1),
    "jamba": (_STATES | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}, _MAMBA_1),
    "zamba": (_STATES | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2}, _MAMBA_1),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}, "consists of recurrent layers only"),
    "recurrent_gemma": ({"lru_width": 32, "num_key_value_heads": 1}, "keeps its states in the layers, not in a cache"),
    "minimax": ({"layer_types": _HALF, "num_local_experts": 4}, "several tokens get a wrong mask"),
    "rwkv": ({"attention_hidden_size": 32}, "keeps its states outside a cache"),
    "xlstm": ({"num_heads": 4}, "keeps its states in a cache of its own"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_architecture_that_cannot_verify_trees_is_refused_with_the_reason(model_type: str) -> None:
    config, reason = REFUSED[model_type]
    target = attach(Architecture(model_type, config).build("eager"))
    with pytest.raises(
        ValueError, match=rf"{type(target).__name__} \({model_type}\) .*{reason}.*Call `generate` without"
    ):
        target.generate(tokens(5), policy="auto", max_new_tokens=2)


@pytest.fixture
def target() -> PreTrainedModel:
    return attach(recurrent("qwen3_next")[0].build())


def with_forward(mixer: Any, forward: Any) -> None:
    mixer.__class__ = type("OwnGatedDeltaNet", (type(mixer),), {"forward": forward})


@pytest.mark.parametrize("layer", [0, 2])
def test_a_mixer_with_a_forward_of_its_own_is_refused(target: PreTrainedModel, layer: int) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super(type(self), self).forward(hidden_states / 2, **kwargs)

    with_forward(target.model.layers[layer].linear_attn, forward)
    answer(target, tokens(5))
    with pytest.raises(ValueError, match="recurrent layers of a class that is not known to read several tokens"):
        answer(target, tokens(5), policy="auto")


def test_a_static_cache_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM has recurrent layers.*`cache_implementation`"):
        answer(target, tokens(5), policy="auto", cache_implementation="static")


def test_a_compiled_target_is_refused(target: PreTrainedModel) -> None:
    answer(target, tokens(3), policy="auto", max_new_tokens=2)  # the first call probes the target
    target.forward = torch.compile(target.forward, backend="eager")
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM has recurrent layers.*before it was compiled"):
        answer(target, tokens(5), policy="auto", disable_compile=True)


def test_an_older_release_is_refused_with_the_one_to_install(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_mixers, "HAS_RECURRENT_STATES", False)
    with pytest.raises(ValueError, match="has recurrent layers, which need Transformers 5.24 or newer"):
        answer(target, tokens(5), policy="auto")
