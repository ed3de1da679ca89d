"""Targets as users load them: quantized, with adapters, spread over devices. Either the plain text or a refusal."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD


WIDE = FixedPolicy(TreeShape(40, 3, VOCABULARY))  # so wide that most picks are drafted
LOOKUPS = FixedPolicy(TreeShape(1, 0, 1, lookup=6))
WINDOWS = [each for each in ARCHITECTURES if each.name.endswith("windows") or each.name == "mistral-window"]


def float32(seed: int = 0) -> PreTrainedModel:
    target = Architecture("llama").build("sdpa", seed)
    return target.float()


def prompts(count: int = 4) -> Iterator[torch.Tensor]:
    for seed in range(count):
        yield torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(seed))


def check_plain_texts(target: Any, head: DraftHead, **options: Any) -> None:
    """With the head and by lookup, the texts of plain `generate`; and drafts are accepted."""
    accepted = 0
    for prompt in prompts():
        plain = target.generate(prompt, max_new_tokens=20, **options)
        for extra in ({"assistant_model": head, "policy": WIDE}, {"policy": LOOKUPS}):
            out = target.generate(prompt, max_new_tokens=20, return_dict_in_generate=True, **extra, **options)
            assert out.sequences.tolist() == plain.tolist()
            accepted += out.speculation.emitted_total - out.speculation.target_forwards
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


# --- quantized -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_one_scale_for_all_rows_of_a_forward_is_refused() -> None:
    """PyTorch's dynamic int8: with it a tree of forty nodes changed six texts of six."""
    target = float32()
    head = DraftHead.from_target(target, 16)
    quantized = attach(torch.ao.quantization.quantize_dynamic(target, {torch.nn.Linear}, dtype=torch.qint8))
    for extra in ({"assistant_model": head, "policy": WIDE}, {"policy": LOOKUPS}):
        with pytest.raises(ValueError, match=r"q_proj.*rounds activations.*Quantize only the weights"):
            quantized.generate(next(prompts()), max_new_tokens=4, **extra)
    assert quantized.generate(next(prompts()), max_new_tokens=4).shape == (1, 13)


class Int8Weights(torch.nn.Module):
    """A linear layer whose weights are int8 with a scale per row, as weight-only quantization leaves it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(linear.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        rounded = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.weight.to(states.dtype) * self.scale)


def test_weights_of_eight_bits_change_nothing() -> None:
    target = float32()
    head = DraftHead.from_target(target, 16)
    for layer in target.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Weights(getattr(layer.mlp, name)))
    check_plain_texts(attach(target), head)


MARKS = ("act_quant_kwargs", "activation_quantization", "act_mapping_type", "input_quant_func")


@pytest.mark.parametrize("mark", MARKS)
def test_activations_rounded_to_few_bits_are_refused(mark: str) -> None:
    """By a scale for each row, too: a last bit becomes a step of 255, and texts part in float32."""
    target = float32()
    head = DraftHead.from_target(target, 16)
    weight = target.model.layers[1].mlp.up_proj.weight
    for name in MARKS:
        setattr(weight, name, None)
    check_plain_texts(attach(target), head)  # as torchao marks a weight whose activations stay as they are
    setattr(weight, mark, object())
    for extra in ({"assistant_model": head, "policy": WIDE}, {"policy": LOOKUPS}):
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.*rounds activations.*Quantize only the weights"):
            target.generate(next(prompts()), max_new_tokens=4, **extra)


def test_layers_that_round_activations_are_refused_by_name() -> None:
    """bitsandbytes' LLM.int8() even looks at all rows for the columns that it leaves out."""
    for name in ("Linear8bitLt", "FP8Linear", "BitLinear"):
        target = float32()
        target.model.layers[0].mlp.gate_proj.__class__ = type(name, (torch.nn.Linear,), {})
        with pytest.raises(ValueError, match="gate_proj.*rounds activations"):
            attach(target).generate(next(prompts()), policy=LOOKUPS, max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("Int8WeightOnlyConfig", False),
        ("Int8DynamicActivationInt8WeightConfig", True),
        ("Int8DynamicActivationIntxWeightConfig", True),
    ],
)
def test_torchao_gives_the_plain_texts_or_is_refused(name: str, refused: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    target = Architecture("llama", {"intermediate_size": 64}).build("sdpa").float()
    head = DraftHead.from_target(target)
    config = getattr(quantization, name)()
    config.set_inductor_config = False  # it would change settings for all tests that follow
    quantization.quantize_(target, config)
    if not refused:
        check_plain_texts(attach(target), head)
        return
    with pytest.raises(ValueError, match="rounds activations"):
        attach(target).generate(next(prompts()), assistant_model=head, max_new_tokens=4)


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted() -> PeftModel:
    """LoRA on attention, MLP, embedding and output: whatever a head borrows is adapted too."""
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    return attach(get_peft_model(float32(), lora).eval())


@pytest.mark.parametrize("d", [None, 16])
def test_an_adapter_enabled_disabled_switched_and_merged(adapted: PeftModel, d: int | None) -> None:
    head = DraftHead.from_target(adapted.get_base_model(), d)
    check_plain_texts(adapted, head)
    first = adapted.generate(next(prompts()), max_new_tokens=20)
    with adapted.disable_adapter():
        assert adapted.generate(next(prompts()), max_new_tokens=20).tolist() != first.tolist()
        check_plain_texts(adapted, head)
    check_plain_texts(attach(adapted.merge_and_unload()), head)


# --- devices -------------------------------------------------------------------------------------------------------


SPREAD = {
    **{f"model.layers.{index}": "disk" if index < 2 else "cpu" for index in range(4)},
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", SPREAD], ids=["cpu", "auto", "disk"])
def test_a_device_map_gives_the_plain_texts(device_map: Any, tmp_path: Path) -> None:
    target = float32()
    head = DraftHead.from_target(target)
    target.save_pretrained(tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    check_plain_texts(attach(loaded), head)


def test_weights_that_wait_on_the_processor_give_the_plain_texts() -> None:
    target = float32()
    head = DraftHead.from_target(target)
    check_plain_texts(attach(cpu_offload(target, execution_device="cpu")), head)


def test_a_model_without_weights_is_refused() -> None:
    target = float32()
    head = DraftHead.from_target(target)
    with pytest.raises(ValueError, match="no weights in `model.embed_tokens`, which is on the meta device"):
        attach(copy.deepcopy(target).to("meta")).generate(next(prompts()), assistant_model=head)
    target.model.layers[2].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="no weights in `model.layers.2.mlp.up_proj`"):
        attach(target).generate(next(prompts()), assistant_model=head)


# --- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
def test_a_cache_without_the_targets_windows_is_refused(architecture: Architecture) -> None:
    """Plain `generate` masks by the config, a tree by the cache: such a cache gave other texts beyond the window."""
    target = attach(architecture.build("sdpa"))
    head, prompt = DraftHead.from_target(target), next(prompts())
    with pytest.raises(ValueError, match=r"sliding windows \[None.*DynamicCache\(config=model.config\)"):
        target.generate(prompt, assistant_model=head, **{CACHE_KEYWORD: DynamicCache()})
    plain = target.generate(prompt, max_new_tokens=20)
    own = {CACHE_KEYWORD: DynamicCache(config=target.config)}
    out = target.generate(prompt, max_new_tokens=20, assistant_model=head, policy=WIDE, **own)
    assert out.tolist() == plain.tolist()
