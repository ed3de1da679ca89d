"""The private seams of Transformers that the engine stands on. A release that moves one fails here, by name."""

import inspect
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.generation.mixin import ReSpSGenerationMixin
from transformers_resps.generation.plan import _NOT_OURS, prepare
from transformers_resps.verifying.attention import _OF_SDPA_ALONE, grouped_attention
from transformers_resps.verifying.masks import RECURRENT_TYPES


_TINY: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_the_decoding_methods_are_looked_up_on_the_class_by_these_names() -> None:
    assert GENERATION_MODES_MAPPING[GenerationMode.ASSISTED_GENERATION] == "_assisted_decoding"
    assert GENERATION_MODES_MAPPING[GenerationMode.SAMPLE] == "_sample"
    assert GENERATION_MODES_MAPPING[GenerationMode.GREEDY_SEARCH] == "_sample"


@pytest.mark.parametrize("name", ["_assisted_decoding", "_sample"])
def test_decoding_methods_are_told_nothing_that_we_do_not_know(name: str) -> None:
    theirs = set(inspect.signature(getattr(GenerationMixin, name)).parameters)
    ours = set(inspect.signature(prepare).parameters) - {"target", "state"}
    assert theirs <= ours | set(_NOT_OURS) | {"self"}


def test_generate_has_the_parameters_we_name() -> None:
    theirs = list(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
    ours = list(inspect.signature(ReSpSGenerationMixin.generate).parameters)[1:-1]
    assert ours == [*theirs, "policy", "lockstep", "compile", "invariant"]


def test_attention_by_sdpa_has_no_option_that_we_would_not_pass_on() -> None:
    theirs = set(inspect.signature(sdpa_attention_forward).parameters)
    ours = set(inspect.signature(grouped_attention).parameters) - {"options"}
    # `cache`, until 5.23, is for paged caches, which hold no tree.
    assert theirs - ours <= {"is_causal", "cache", "kwargs", *_OF_SDPA_ALONE}


def test_cache_layers_have_what_we_touch() -> None:
    sliding = DynamicSlidingWindowLayer(sliding_window=8)
    assert sliding.is_sliding and not DynamicLayer.is_sliding
    assert {"keys", "values"} <= set(vars(sliding)) | set(dir(sliding))
    assert callable(sliding.activate_past_recording) and callable(sliding.crop)


def test_static_layers_have_what_we_touch() -> None:
    layer = StaticLayer(max_cache_len=8)
    assert layer.max_cache_len == 8 and layer.cumulative_length.tolist() == 0 and not layer.is_initialized
    layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    assert layer.keys.shape == layer.values.shape == (1, 1, 8, 2)
    assert layer.cumulative_length.tolist() == layer.get_seq_length() == 3


def test_compilation_is_decided_and_done_by_these_names() -> None:
    assert list(inspect.signature(GenerationMixin._valid_auto_compile_criteria).parameters)[1:] == [
        "model_kwargs",
        "generation_config",
    ]
    assert list(inspect.signature(LlamaForCausalLM.get_compiled_call).parameters) == ["self", "compile_config"]
    assert CompileConfig._compile_all_devices is None
    assert LlamaForCausalLM(LlamaConfig(**_TINY))._compiled_call_impl is None
    assert hasattr(torch.compile(abs, backend="eager"), "_torchdynamo_orig_callable")


def test_decoding_may_be_wrapped_for_experts() -> None:
    assert hasattr(GenerationMixin, "_optimize_model_for_decode")


def test_the_dropped_mask_and_the_pad_token_arrive_as_we_read_them() -> None:
    """`_sample` gets the mask as `None` when nothing is padded, every position, a cache, and `_pad_token_tensor`."""
    seen: dict[str, Any] = {}

    class Watching(LlamaForCausalLM):
        def _sample(self, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
            seen.update(kwargs, pad=generation_config._pad_token_tensor)
            return input_ids

    Watching(LlamaConfig(**_TINY)).generate(torch.tensor([[3, 4, 5]]), max_new_tokens=1, pad_token_id=0)
    assert seen["attention_mask"] is None
    assert seen["position_ids"].tolist() == [[0, 1, 2]]
    assert type(seen[CACHE_KEYWORD]) is DynamicCache
    assert seen["pad"].item() == 0


def test_models_tell_their_attention_and_their_recurrence_by_these_names() -> None:
    assert LlamaConfig(attn_implementation="sdpa")._attn_implementation == "sdpa"
    told = [getattr(kind, "_is_stateful", None) for kind in (LlamaForCausalLM, MambaForCausalLM)]
    assert told == [False, True] or (told == [None, None] and set(MambaConfig().layer_types) <= RECURRENT_TYPES)


def test_an_offloading_hook_is_found_by_this_name() -> None:
    """Of accelerate: `refusals` tells by it whether weights on the meta device will be there in time."""
    model = cpu_offload(torch.nn.Sequential(torch.nn.Linear(2, 2)), execution_device="cpu")
    assert model[0].weight.is_meta and hasattr(model[0], "_hf_hook")


def test_the_rotary_embedding_of_a_head_is_llamas() -> None:
    config = LlamaConfig(head_dim=8)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 3, 8), torch.arange(3)[None])
    assert cos.shape == sin.shape == (1, 3, 8)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_torch_packs_linear_weights_by_these_names() -> None:
    weight, states = torch.randn(4, 3), torch.randn(2, 3)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    found = torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")
    torch.testing.assert_close(found, states @ weight.T)
