"""What `invariant=True` cannot keep is refused by name, and what calls in the mode do not agree in is warned of."""

import copy
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MethodType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    MaxTimeCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tests.image_processors import image_target
from tests.kernels import deterministic_algorithms, products_in_bfloat16, without_onednn
from tests.recurrent_targets import recurrent
from tests.targets import ARCHITECTURES, Architecture
from transformers_resps import FixedPolicy, Observation, TreeShape, attach, prepack, unprepack
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying import unknown_targets
from transformers_resps.verifying.cache import crop_to
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.invariant.calls import InvariantCalls, InvariantMode
from transformers_resps.verifying.invariant.row_classes import RowNeeds
from transformers_resps.verifying.invariant.verifier import ModelCode
from transformers_resps.verifying.slots.engine import SlotEngine


class Told(FixedPolicy):
    """Keeps what it is told of paths."""

    def __init__(self) -> None:
        super().__init__(TreeShape(1, 0, 1, lookup=4))
        self.paths_cost = set[bool]()

    def choose(self, observation: Observation) -> TreeShape:
        self.paths_cost.add(observation.pricing.paths_cost)
        return super().choose(observation)


LOOKUP = FixedPolicy(TreeShape(1, 0, 1, lookup=4))
PROMPT = torch.tensor([[3, 4, 5, 3, 4]])
INVARIANT: dict[str, Any] = {"invariant": True, "max_new_tokens": 4, "do_sample": False}
WAY_OUT = "or pass `invariant=False`"


@pytest.fixture
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"num_hidden_layers": 2}).build("sdpa"))


def plain() -> PreTrainedModel:
    return Architecture("llama", {"num_hidden_layers": 1}).build("sdpa")


def named(name: str, attention: str = "sdpa") -> PreTrainedModel:
    (architecture,) = (one for one in ARCHITECTURES if str(one) == name)
    return architecture.build(attention)


def encoder_decoder() -> PreTrainedModel:
    layers = {
        f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=19, d_model=8, **layers)).eval()


def gpt_neox_japanese() -> PreTrainedModel:
    """It computes its attention itself."""
    config = GPTNeoXJapaneseConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    return GPTNeoXJapaneseForCausalLM(config).eval()


def compiled_in_place(part: Callable[[Any], nn.Module]) -> PreTrainedModel:
    target = plain()
    part(target).compile()
    return target


def changed(part: str, **attributes: Any) -> PreTrainedModel:
    """A target of which one part has other attributes."""
    target = plain()
    for name, value in attributes.items():
        setattr(target.get_submodule(part), name, value)
    return target


class Shard(nn.Parameter):
    """Stands for a weight that is quantized or sharded."""


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 128}
DBRX = {
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    "n_layers": 1,
    "d_model": 32,
    "attn_config": {"rope_theta": 1e4},
}
TARGETS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "an encoder-decoder": (encoder_decoder, "an encoder-decoder"),
    "recurrent layers": (lambda: recurrent("qwen3_5_text")[0].build(), "recurrent layers read prompts by chunks"),
    "images": (image_target, "whose prompts stock `generate` reads"),
    "longrope": (
        lambda: Architecture("phi3", {"rope_parameters": LONGROPE}).build("sdpa"),
        "rope_type 'longrope', whose frequencies depend on the longest row",
    ),
    "eager attention": (lambda: named("llama", "eager"), r"attn_implementation='eager'.*set_attn_impl"),
    "an attention of its own": (gpt_neox_japanese, "does not ask .* `AttentionInterface`"),
    "soft caps": (lambda: named("gemma2", "eager"), "attn_logit_softcapping"),
    "position biases": (
        lambda: changed("model.layers.0.self_attn", relative_attention_bias=nn.Embedding(4, 4)),
        "the position biases of LlamaAttention",
    ),
    "experts of their own": (lambda: Architecture("dbrx", DBRX).build("sdpa"), "the experts of DbrxForCausalLM"),
    "a compiled model": (lambda: compiled_in_place(lambda target: target), "LlamaForCausalLM that you compiled"),
    "a compiled forward": (
        lambda: changed("", forward=torch.compile(plain().forward)),
        "the LlamaForCausalLM that you compiled.*`compile=True`",
    ),
    "a compiled layer": (lambda: compiled_in_place(lambda target: target.model.layers[0]), "LlamaDecoderLayer that"),
    "a layer in the wrapper of a compiler": (
        lambda: changed("model.layers.0", mlp=torch.compile(nn.Identity())),
        "the OptimizedModule that you compiled",
    ),
    "a sharded weight": (lambda: changed("lm_head", weight=Shard(torch.ones(19, 32))), "quantized or sharded weights"),
    "quantized weights": (lambda: changed("", hf_quantizer=object()), "quantized or sharded weights"),
}


@pytest.mark.parametrize("row", TARGETS)
def test_a_target_whose_text_would_depend_on_drafts_is_refused_by_name(row: str) -> None:
    make, message = TARGETS[row]
    target = attach(make())
    with pytest.raises(ValueError, match=f"`invariant=True` does not support .*{message}.*{WAY_OUT}"):
        target.generate(PROMPT, **INVARIANT)


ONES = torch.ones_like(PROMPT)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "auto": ({"compile": "auto"}, "compile='auto', which goes by the clock. Pass `compile=True`"),
    "options of the compiler": ({"compile_config": CompileConfig()}, "a `compile_config`. Pass `compile=True`"),
    "the same in a config": (
        {"generation_config": GenerationConfig(compile_config=CompileConfig(), max_new_tokens=4)},
        "a `compile_config`",
    ),
    "a static cache": ({"cache_implementation": "static"}, "a static cache. Leave it out"),
    "a static cache of the caller's": (
        {CACHE_KEYWORD: lambda target: StaticCache(config=target.config, max_cache_len=32)},
        "a static cache",
    ),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 5, 32, dtype=torch.float64)}, r"more than tokens.*inputs_embeds"),
    "a time": ({"max_time": 5.0}, "`max_time`, which ends a text by the clock. Set `max_new_tokens`"),
    "guidance": ({"guidance_scale": 1.5}, "`guidance_scale`, which runs the model once more, in the normal mode"),
    "a processor of guidance": (
        {"logits_processor": lambda target: [UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, target)]},
        "`guidance_scale`",
    ),
    "a criterion of time": ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(5.0)])}, "`max_time`"),
}


MADE = (CACHE_KEYWORD, "logits_processor")  # of the target


def made(options: dict[str, Any], target: PreTrainedModel) -> dict[str, Any]:
    return {name: value(target) if name in MADE else value for name, value in options.items()}


@pytest.mark.parametrize("row", CALLS)
def test_a_setting_that_would_change_the_text_is_refused_by_name(row: str, target: PreTrainedModel) -> None:
    options, message = CALLS[row]
    with pytest.raises(ValueError, match=f"`invariant=True` does not support .*{message}.*{WAY_OUT}"):
        target.generate(PROMPT, **INVARIANT | made(options, target))


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_windows_sinks_and_experts_that_ask_the_interface_are_no_obstacle(name: str) -> None:
    """Attention sinks are written for eager attention alone."""
    target = attach(named(name, "eager" if name == "gpt_oss" else "sdpa"))
    InvariantCalls(SlotEngine()).admit(target, lambda name: None, {})


def test_an_adapter_is_no_obstacle(target: Any) -> None:
    wrapped: Any = get_peft_model(target, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    assert wrapped.generate(input_ids=PROMPT, **INVARIANT).shape[1] == PROMPT.shape[1] + 4


def test_a_target_with_sinks_attends_as_it_did_after_a_call_in_the_mode() -> None:
    target = attach(named("gpt_oss", "eager"))
    expected = target(PROMPT).logits
    target.generate(PROMPT, **INVARIANT)
    assert target.config._attn_implementation == "eager" and torch.equal(target(PROMPT).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if str(one) != "gemma2"], ids=str)
def test_a_known_architecture_need_not_be_compared(architecture: Architecture, dtype: torch.dtype) -> None:
    target: Any = attach(architecture.build(architecture.attention[0])).to(dtype)
    mode = InvariantMode(SlotEngine(), ModelCode(), RowNeeds(16))
    assert unknown_targets._has_same_bits(target, lambda positions: mode.verifier(TargetForward.of(target), positions))


def newcomer() -> PreTrainedModel:
    """Of an architecture that was never compared."""
    target = plain().float()
    target.config.model_type = "newcomer"
    return attach(target)


def test_an_unknown_architecture_is_compared_bit_for_bit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[PreTrainedModel] = []

    def watched(target: PreTrainedModel, *arguments: Any) -> bool:
        compared.append(target)
        return compare(target, *arguments)

    compare = unknown_targets._has_same_bits
    monkeypatch.setattr(unknown_targets, "_has_same_bits", watched)
    target = newcomer()
    for _ in range(2):
        target.generate(PROMPT, **INVARIANT)
    assert compared == [target]
    target.generate(PROMPT, **INVARIANT | {"invariant": False, "policy": LOOKUP})
    assert compared == [target]


def test_an_unknown_architecture_that_looks_at_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By so little that a tree in the normal mode is within its tolerance."""
    target: Any = newcomer()
    kind = type(target.model.layers[0].mlp)
    run = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: run(self, states) + 1e-5 * states.mean(1, keepdim=True))
    assert target.generate(PROMPT, policy=LOOKUP, max_new_tokens=2).shape[1] == PROMPT.shape[1] + 2
    with pytest.raises(ValueError, match=r"\(newcomer\) gives other logits to a token when other .*`invariant=False`"):
        target.generate(PROMPT, **INVARIANT)


def test_an_unknown_architecture_whose_attention_is_not_told_of_the_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target: Any = newcomer()
    kind = type(target.model.layers[0].self_attn)
    run = kind.forward

    def deaf(self: Any, *args: Any, resps_reads: Any = None, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", deaf)
    with pytest.raises(ValueError, match=r"\(newcomer\) fails on the attention of `invariant=True` \(RuntimeError"):
        target.generate(PROMPT, **INVARIANT)


def test_autocast_is_refused(target: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="support autocast. Leave its block"):
        target.generate(PROMPT, **INVARIANT)


def test_autocast_inside_the_models_forward_is_refused(target: Any) -> None:
    """As `Accelerator(mixed_precision="bf16").prepare` leaves it; no setting shows it before the forward runs."""
    target.float()
    target.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(type(target).forward), target)
    with pytest.raises(ValueError, match=r"computes in \['torch.bfloat16'\] with weights in torch.float32"):
        target.generate(PROMPT, **INVARIANT)


def test_weights_elsewhere_are_refused(target: Any) -> None:
    """Here on the meta device, with hooks that bring them."""
    cpu_offload(target)
    with pytest.raises(ValueError, match=r"weights on \['meta'\], where the mode has never run"):
        target.generate(PROMPT, **INVARIANT)


def test_another_cache_is_refused_as_without_the_mode(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Stream", MagicMock())  # PyTorch for GPUs makes none without one
    offloaded = DynamicCache(config=target.config, offloading=True)
    with pytest.raises(ValueError, match="offloaded cache"):
        target.generate(PROMPT, cache=offloaded, **INVARIANT)
    for name in ("quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
            target.generate(PROMPT, cache_implementation=name, **INVARIANT)


def test_no_work_is_done_before_a_refusal_and_none_is_needed_after_it(target: PreTrainedModel) -> None:
    forwards: list[Any] = []
    hook = target.register_forward_pre_hook(lambda *arguments: forwards.append(arguments))
    for options, _ in CALLS.values():
        with pytest.raises(ValueError):
            target.generate(PROMPT, **INVARIANT | made(options, target))
    assert not forwards
    hook.remove()
    assert target.generate(PROMPT, **INVARIANT).shape[1] > PROMPT.shape[1]


def test_the_normal_mode_takes_all_that_the_mode_refuses(target: PreTrainedModel) -> None:
    options = {"policy": LOOKUP, "max_new_tokens": 2, "do_sample": False, "invariant": False}
    assert target.generate(PROMPT, max_time=60.0, **options).shape[1] > PROMPT.shape[1]


@pytest.mark.parametrize("options", [{"policy": LOOKUP}, {}], ids=["trees", "stock"])
def test_another_thread_decodes_in_the_normal_mode_meanwhile(options: dict[str, Any], target: Any) -> None:
    """In the middle of a forward of the mode, while the target shows the name of its attention."""
    normal = {"max_new_tokens": 4, "do_sample": False} | options
    expected, invariant = (target.generate(PROMPT, **call).tolist() for call in (normal, INVARIANT))
    found: list[Any] = []

    def meanwhile(*_: Any) -> None:
        if not found and target.config._attn_implementation == "resps_invariant":
            found.append(None)
            with ThreadPoolExecutor(1) as others:
                found.append(others.submit(target.generate, PROMPT, **normal).result().tolist())

    target.model.layers[0].mlp.register_forward_pre_hook(meanwhile)
    assert target.generate(PROMPT, **INVARIANT).tolist() == invariant
    assert found[1:] == [expected]


# Caches


def filled(target: PreTrainedModel, *, invariant: bool, prompt: torch.Tensor = PROMPT, **options: Any) -> Any:
    given = {"policy": LOOKUP, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True} | options
    return target.generate(prompt, invariant=invariant, **given)


REFUSED_CACHE = (
    "goes on from a cache that only such calls of this model have filled, and this `DynamicCache` has other"
)


def test_a_cache_that_the_mode_returned_goes_on_in_it(target: PreTrainedModel) -> None:
    first = filled(target, invariant=True)
    again = filled(target, invariant=True, prompt=first.sequences, cache=first[CACHE_KEYWORD])
    assert again.sequences.shape[1] == PROMPT.shape[1] + 8
    assert again[CACHE_KEYWORD] is first[CACHE_KEYWORD]
    filled(target, invariant=True, prompt=again.sequences, cache=again[CACHE_KEYWORD])


def test_an_empty_cache_of_the_callers_is_filled_in_the_mode(target: PreTrainedModel) -> None:
    cache = DynamicCache(config=target.config)
    first = filled(target, invariant=True, cache=cache)
    crop_to(cache, PROMPT.shape[1] - 1)
    assert filled(target, invariant=True, cache=cache).sequences.tolist() == first.sequences.tolist()


@pytest.mark.parametrize("options", [{"policy": LOOKUP}, {"policy": "plain"}], ids=["trees", "stock"])
def test_a_cache_that_the_normal_mode_filled_or_went_on_with_is_refused(
    options: dict[str, Any], target: PreTrainedModel
) -> None:
    normal = {"policy": None, "invariant": False, "max_new_tokens": 4, "do_sample": False} | options
    cache = DynamicCache(config=target.config)
    tokens = target.generate(PROMPT, **normal, cache=cache)
    with pytest.raises(ValueError, match=REFUSED_CACHE):
        filled(target, invariant=True, prompt=tokens, cache=cache)
    first = filled(target, invariant=True)
    tokens = target.generate(first.sequences, **normal, cache=first[CACHE_KEYWORD])
    with pytest.raises(ValueError, match=REFUSED_CACHE):
        filled(target, invariant=True, prompt=tokens, cache=first[CACHE_KEYWORD])


def test_the_cache_of_a_batch_whose_rows_ended_apart_is_refused(target: PreTrainedModel) -> None:
    """The padding of its shorter rows is read in the normal mode."""
    rows = torch.cat([PROMPT, PROMPT.flip(1) + 6])
    written = filled(target, invariant=True, prompt=rows, max_new_tokens=8).sequences[:, PROMPT.shape[1] :]
    end = next(token for token in written[0].tolist() if token not in written[1])
    first = filled(target, invariant=True, prompt=rows, max_new_tokens=8, eos_token_id=end)
    with pytest.raises(ValueError, match="only such calls of this model have filled, and this .* has other entries"):
        filled(target, invariant=True, prompt=first.sequences, cache=first[CACHE_KEYWORD])


def test_a_padded_batch_goes_on_from_its_cache(target: PreTrainedModel) -> None:
    rows, mask = torch.cat([PROMPT, PROMPT.flip(1)]), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    expected = filled(target, invariant=True, prompt=rows, attention_mask=mask, max_new_tokens=8).sequences
    first = filled(target, invariant=True, prompt=rows, attention_mask=mask)
    options = {"cache": first[CACHE_KEYWORD], "attention_mask": torch.nn.functional.pad(mask, (0, 4), value=1)}
    assert filled(target, invariant=True, prompt=first.sequences, **options).sequences.tolist() == expected.tolist()


def test_the_cache_of_another_model_or_a_copy_is_refused(target: PreTrainedModel) -> None:
    first = filled(target, invariant=True)
    for cache, other in ((copy.deepcopy(first[CACHE_KEYWORD]), target), (first[CACHE_KEYWORD], copy.deepcopy(target))):
        with pytest.raises(ValueError, match=f"{REFUSED_CACHE}.*itself and no copy"):
            filled(other, invariant=True, prompt=first.sequences, cache=cache)


# What calls agree in


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings since it was last asked."""

    def taken() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        caplog.clear()
        return found

    return taken


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As if so many computed: real ones wait for each other on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: count)
        yield


@contextmanager
def packed(target: PreTrainedModel) -> Iterator[None]:
    prepack(target)
    try:
        yield
    finally:
        unprepack(target)


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "threads": (lambda _: threads(2), r"get_num_threads\(\) is: it was 1 .* and is 2 now"),
    "packing": (packed, "`prepack` is: it was False in this model's first such call and is True now"),
    "oneDNN": (lambda _: without_onednn(), "mkldnn.enabled is: it was True"),
    "algorithms": (lambda _: deterministic_algorithms(), r"algorithms_enabled\(\) is: it was False"),
}


@pytest.mark.parametrize("row", CHANGES)
def test_a_call_that_rounds_otherwise_than_the_first_one_warns_once(
    row: str, target: PreTrainedModel, warned: Callable[[], list[str]]
) -> None:
    change, message = CHANGES[row]
    target.float()
    with threads(1):
        target.generate(PROMPT, **INVARIANT)
        assert not warned()
        for expected in (1, 0):
            with change(target):
                target.generate(PROMPT, **INVARIANT)
            found = warned()
            assert [bool(re.search(message, warning)) for warning in found] == [True] * expected


def test_a_precision_that_was_set_for_one_backend_alone_is_told(
    target: PreTrainedModel, warned: Callable[[], list[str]]
) -> None:
    target.generate(PROMPT, **INVARIANT)
    with products_in_bfloat16(), pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    with products_in_bfloat16():
        target.generate(PROMPT, **INVARIANT)
    (found,) = warned()
    assert re.search("mkldnn.matmul.fp32_precision is: it was ieee .* and is bf16 now", found)


def test_the_warning_names_what_differs(target: PreTrainedModel, warned: Callable[[], list[str]]) -> None:
    target.float().generate(PROMPT, **INVARIANT)
    target.bfloat16().generate(PROMPT, **INVARIANT)
    (found,) = warned()
    assert "the dtype is: it was torch.float32" in found and "is torch.bfloat16 now" in found


def test_calls_in_the_normal_mode_need_to_agree_in_nothing(
    target: PreTrainedModel, warned: Callable[[], list[str]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        target.to(dtype).generate(PROMPT, policy=LOOKUP, max_new_tokens=2)
    assert not warned()


@pytest.mark.parametrize("invariant", [True, False])
def test_a_policy_is_told_that_paths_cost_in_the_mode_alone(target: PreTrainedModel, invariant: bool) -> None:
    policy = Told()
    target.generate(PROMPT, **INVARIANT | {"invariant": invariant}, policy=policy)
    assert policy.paths_cost == {invariant}
