"""Weights of few bits: what libraries hold against what we read, multiply and compile."""

import ctypes
import logging
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from tests.compilation.as_it_is import compiled_as_it_is
from tests.compilation.test_kernels import library_of
from tests.kernels import needs_compiler
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, detach, prepack, unprepack
from transformers_resps.compilation import packages
from transformers_resps.compilation.few_bits import (
    Codes,
    exposed,
    few_bits,
    few_bits_linear,
    named_weights,
    numbers,
    pack_codes,
    pack_factors,
    unread_weights,
)
from transformers_resps.compilation.kernels import NEVER, TILES, VECTORS, reads_few_bits
from transformers_resps.compilation.packages import FOLDER_VARIABLE
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.slots.verifier import SlotMode


needs_lookups = pytest.mark.skipif(not reads_few_bits(), reason="asks for AVX512-BF16 and AVX512-VBMI")


def run(
    kernel: str,
    rows: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    offsets: list[Tensor] | None,
    kind: Codes,
    bias: Tensor | None = None,
    *,
    is_gated: bool = False,
) -> Tensor:
    packed = [pack_codes(codes, kind, is_gated), pack_factors(scales, is_gated)]
    packed.append(None if offsets is None else pack_factors(offsets, is_gated))
    table = None if kind is Codes.INT8 else numbers(torch.arange(16, dtype=torch.uint8), kind).bfloat16()
    width = len(codes[0]) if is_gated else sum(map(len, codes))
    result = rows.new_empty(len(rows), width)
    places = [
        None if part is None else ctypes.c_void_p(part.data_ptr()) for part in (rows, *packed, table, bias, result)
    ]
    sizes = map(ctypes.c_int64, (*rows.shape, width, scales[0].shape[1]))
    from_row = ctypes.c_int64(1 if kernel == TILES else NEVER)
    assert library_of(kernel).resps_run_few_bits_alone(*places, *sizes, ctypes.c_int(is_gated), from_row)
    return result


def drawn(kind: Codes, outputs: int, inputs: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    least, most = (-128, 128) if kind is Codes.INT8 else (0, 16)
    codes = torch.randint(least, most, (outputs, inputs), generator=generator)
    scales, offsets = torch.rand(2, outputs, groups, generator=generator) / 100 + 0.001
    return codes.to(torch.int8 if kind is Codes.INT8 else torch.uint8), scales, offsets


def weight_of(codes: Tensor, scales: Tensor, offsets: Tensor | None, kind: Codes) -> Tensor:
    """In float64, from numbers as the kernels have them: NF4's are rounded to bfloat16."""
    values = numbers(codes, kind).bfloat16().double().unflatten(1, (scales.shape[1], -1)) * scales.double()[..., None]
    return (values if offsets is None else values + offsets.double()[..., None]).flatten(1)


@needs_lookups
@needs_compiler
@pytest.mark.parametrize("kernel", [VECTORS, TILES])
@pytest.mark.parametrize("kind", list(Codes))
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(64, 96, 1), (576, 200, 9), (256, 7, 8), (320, 70, 2)])
@pytest.mark.parametrize("has_offsets", [True, False])
def test_products_are_those_of_the_same_numbers_and_a_row_gets_the_same_bits_beside_others(
    kernel: str, kind: Codes, inputs: int, outputs: int, groups: int, has_offsets: bool
) -> None:
    codes, scales, offsets = drawn(kind, outputs, inputs, groups)
    own = [offsets] if has_offsets else None
    rows, bias = torch.randn(70, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    whole = run(kernel, rows, [codes], [scales], own, kind, bias)
    exactly = functional.linear(
        rows.double(), weight_of(codes, scales, offsets if has_offsets else None, kind), bias.double()
    )
    assert (whole.double() - exactly).norm() < 2**-8 * exactly.norm()  # what rounding the result to bfloat16 costs
    for count in (1, 2, 5, 12, 13, 32, 33, 69):
        some = run(kernel, rows[-count:].contiguous(), [codes], [scales], own, kind, bias)
        assert torch.equal(some, whole[-count:])


@needs_lookups
@needs_compiler
@pytest.mark.parametrize("kernel", [VECTORS, TILES])
def test_layers_are_joined_and_gated(kernel: str) -> None:
    kind, rows = Codes.INT4, torch.randn(37, 128).bfloat16()
    gate, up = drawn(kind, 96, 128, 2, seed=1), drawn(kind, 96, 128, 2, seed=2)
    codes, scales, offsets = map(list, zip(gate, up, strict=True))
    apart = [run(kernel, rows, [part[0]], [part[1]], [part[2]], kind) for part in (gate, up)]
    assert torch.equal(run(kernel, rows, codes, scales, offsets, kind), torch.cat(apart, dim=1))
    gated = run(kernel, rows, codes, scales, offsets, kind, is_gated=True)
    assert (gated == functional.silu(apart[0]) * apart[1]).float().mean() > 0.98


def test_a_scale_that_is_not_finite_is_told() -> None:
    with pytest.raises(RuntimeError, match="scale of its quantized weights is not finite"):
        pack_factors([torch.tensor([[1.0], [float("nan")]])], False)


def torchao_layer(config: Callable[[Any, Any], Any]) -> Callable[[nn.Linear], nn.Linear]:
    def quantize(layer: nn.Linear) -> nn.Linear:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(layer, config(quantization, quantization.quant_primitives.MappingType))
        return layer

    return quantize


def nf4_layer(layer: nn.Linear, *, is_nested: bool = False, ran: bool = False) -> nn.Linear:
    library = pytest.importorskip("bitsandbytes")
    made: nn.Linear = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type="nf4",
        compress_statistics=is_nested,
    )
    made.load_state_dict(layer.state_dict())
    made = made.to(torch.bfloat16).to("cpu")
    assert made.weight.quant_state is not None
    if ran:
        with torch.no_grad():
            made.eval()(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
    return made


LIBRARIES: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    # Without `set_inductor_config=False` torchao changes settings for all tests that follow.
    "int8": torchao_layer(lambda ao, _: ao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)),
    "intx 8": torchao_layer(lambda ao, _: ao.IntxWeightOnlyConfig(torch.int8, ao.PerGroup(64))),
    "intx 4": torchao_layer(lambda ao, _: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32))),
    "intx 3": torchao_layer(lambda ao, _: ao.IntxWeightOnlyConfig(torch.int3, ao.PerGroup(128))),
    "intx 4 with zeros": torchao_layer(
        lambda ao, kinds: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(64), mapping_type=kinds.ASYMMETRIC)
    ),
    "int4, opaque": torchao_layer(
        lambda ao, _: pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(
            group_size=64, set_inductor_config=False
        )
    ),
    "nf4": nf4_layer,
    "nf4, nested": lambda layer: nf4_layer(layer, is_nested=True),
    "nf4, after a forward": lambda layer: nf4_layer(layer, ran=True),
    "nf4, nested, after a forward": lambda layer: nf4_layer(layer, is_nested=True, ran=True),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_we_read_the_numbers_of_the_libraries(name: str) -> None:
    torch.manual_seed(0)
    layer = LIBRARIES[name](nn.Linear(256, 64).bfloat16())
    weight = few_bits(layer)
    assert weight is not None
    rows = torch.randn(5, 256).bfloat16()
    ours = few_bits_linear(rows, *weight.read(), layer.bias, int(weight.kind))
    with torch.no_grad():
        theirs = layer.eval()(rows)
    assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: setattr(weight, "act_pre_scale", torch.ones(256)),
        lambda weight: setattr(weight, "act_quant_kwargs", object()),
        lambda weight: setattr(weight, "block_size", [1, 16]),  # groups that no tile divides
        lambda weight: setattr(weight, "block_size", [2, 128]),
    ],
)
def test_a_layout_that_we_do_not_read_is_left_to_its_library(change: Callable[[Any], None]) -> None:
    target = quantized("int8")
    layer = target.model.layers[1].mlp.down_proj
    assert few_bits(layer) is not None and (unread_weights(target) == []) is reads_few_bits()
    change(layer.weight)
    assert few_bits(layer) is None and unread_weights(target) == ["Int8Tensor"]


@pytest.mark.parametrize("name", ["int8", "int4, opaque"])
def test_weights_of_releases_without_later_attributes_are_read(name: str) -> None:
    """torchao 0.15, for example, has no `act_pre_scale` and no `zero_point`."""
    layer = LIBRARIES[name](nn.Linear(256, 64).bfloat16())
    weight = few_bits(layer)
    assert weight is not None
    expected = weight.read()
    for attribute in ("act_quant_scale", "act_pre_scale", "act_mapping_type", "zero_point"):
        if hasattr(layer.weight, attribute):
            delattr(layer.weight, attribute)
    older = few_bits(layer)
    assert older is not None and all(map(torch.equal, older.read()[:2], expected[:2]))


def test_weights_are_exposed_inside_the_block_alone() -> None:
    layer = LIBRARIES["int8"](nn.Linear(256, 64).bfloat16())
    rows, weight = torch.randn(3, 256).bfloat16(), layer.weight
    before, attributes = layer(rows), dict(vars(layer))
    with exposed(layer):
        assert dict(layer.named_buffers()).keys() == {"weight_codes", "weight_scales", "weight_offsets"}
        assert named_weights(layer).keys() == {"bias", "weight_codes", "weight_scales", "weight_offsets"}
        assert (layer(rows) - before).norm() < 0.01 * before.norm()
    assert layer.weight is weight and vars(layer).keys() == attributes.keys() and torch.equal(layer(rows), before)
    assert named_weights(layer).keys() == {"bias", "weight_codes", "weight_scales", "weight_offsets"}


SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}


def quantized(*names: str, **sizes: int) -> PreTrainedModel:
    """Layers take turns with these formats."""
    target = Architecture("qwen2", SIZES | sizes).build("sdpa").bfloat16()
    formats = cycle(names)
    for parent in list(target.model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, child, LIBRARIES[next(formats)](layer))
    return target.eval()


@needs_lookups
@needs_compiler
def test_steps_of_a_quantized_target_run_compiled_and_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    target = attach(quantized("int8", "intx 4", "nf4", num_hidden_layers=1), compile=True, invariant=True)
    prompt = torch.randint(1, VOCABULARY, (1, 9))
    with torch.no_grad():
        before = target(prompt).logits
    head = DraftHead.from_target(target, feature_layers=[0])
    settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    texts = [
        target.generate(prompt, **settings, **drafting).sequences.tolist()
        for drafting in (
            {},
            {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=4))},
            {"assistant_model": head, "policy": FixedPolicy(TreeShape(12, 2, 5))},
        )
    ]
    assert texts[0] == texts[1] == texts[2]
    monkeypatch.setattr(packages, "_compile", None)  # code is loaded
    again = attach(quantized("int8", "intx 4", "nf4", num_hidden_layers=1), compile=True, invariant=True)
    assert again.generate(prompt, **settings).sequences.tolist() == texts[0]
    for engine in (model.speculation_state.slot_engine for model in (target, again)):
        assert engine.is_compiled and not engine.is_broken and "without compilation" not in caplog.text
    detach(target)
    with torch.no_grad():
        assert torch.equal(target(prompt).logits, before)


@pytest.mark.parametrize(("names", "least"), [(["int8"], 2), ([], 4)])
def test_a_step_over_slots_has_two_rows_if_weights_have_few_bits(names: list[str], least: int) -> None:
    target = quantized(*names) if names else Architecture("qwen2", SIZES).build("sdpa").bfloat16().eval()
    with torch.no_grad(), SlotMode().verifier(TargetForward.of(target), torch.arange(6)[None]) as verifier:
        verifier.prefill(PROMPT)
        verifier.verify(DraftTree.root_only(PROMPT[:, 0]))
        assert verifier.pricing.least_nodes == least


def test_prepack_leaves_quantized_layers_and_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    target, prompt = quantized("int8"), torch.randint(1, VOCABULARY, (1, 9))
    with torch.no_grad():
        before = target(prompt).logits
        packed = prepack(target)(prompt).logits
        assert "oneDNN packs no Int8Tensor" in caplog.text and "q_proj" in caplog.text
        assert (packed - before).norm() < 0.02 * before.norm()
        assert torch.equal(unprepack(target)(prompt).logits, before)


PLAIN = FixedPolicy(TreeShape.plain())  # the forwards of plain decoding, by our steps
PROMPT = torch.tensor([[5, 7, 11, 3, 5, 7]])


def written(target: Any, **options: Any) -> list[int]:
    tokens: list[int] = target.generate(PROMPT, max_new_tokens=8, do_sample=False, **options)[0].tolist()
    return tokens


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, lambda target: target.to(torch.float32)])
@pytest.mark.parametrize("name", ["int8", "intx 4", "int4, opaque", "nf4"])
def test_a_model_that_was_cast_decodes_as_its_library_does_or_is_refused_by_name(
    name: str, cast: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    target = attach(cast(quantized(name)))
    try:
        plain = written(target, policy="plain")
    except RuntimeError:  # of the library, whose weights have kept their dtype
        said = rf"has the quantized layer `model.layers.0.self_attn.q_proj`, which does not run in {target.dtype} \(.*"
        with pytest.raises(ValueError, match=said + "Load the model anew in bfloat16"):
            written(target, policy=PLAIN, compile=True)
    else:
        assert written(target, policy=PLAIN, compile=True) == plain
        assert f"in {target.dtype} here" in caplog.text and "Compiling" not in caplog.text


@needs_lookups
@needs_compiler
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_model_that_is_cast_after_it_was_compiled_goes_on_without(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = attach(quantized(name))
    with compiled_as_it_is() as noted:
        written(target, policy=PLAIN, compile=True)
        assert target.speculation_state.slot_engine.is_compiled
        noted.clear()
        target.float()
        assert written(target, policy=PLAIN, compile=True) == written(target, policy="plain") and not noted
    (reason,) = [line for line in caplog.messages if "without compilation" in line]
    assert "compiled steps do not read" in reason and "in torch.float32 here" in reason


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("int8", {"hidden_size": 48}),
        ("nf4", {"hidden_size": 32}),  # blocks of 64: bitsandbytes cannot pack them for processors with AVX512-BF16
        ("nf4", {"intermediate_size": 96}),
        ("nf4", {"intermediate_size": 80}),
    ],
)
def test_sizes_that_no_tile_or_block_divides_give_the_librarys_text_or_a_refusal(
    name: str, sizes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    target = attach(quantized(name, **sizes))
    try:
        plain = written(target, policy="plain")
    except (RuntimeError, AssertionError):
        with pytest.raises(ValueError, match="has the quantized layer.*quantize only layers whose sizes and weights"):
            written(target, policy=PLAIN, compile=True)
    else:
        assert written(target, policy=PLAIN, compile=True) == plain
        assert f"compiled steps do not read {type(target.model.layers[0].mlp.up_proj.weight).__name__}" in caplog.text


@pytest.mark.parametrize("name", ["int8", "intx 4"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused_by_the_name_of_its_layer(name: str, scale: float) -> None:
    target = attach(quantized(name))
    written(target, policy=PLAIN)
    broken = attach(quantized(name))
    broken.model.layers[1].mlp.up_proj.weight.scale[5] = scale
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj`, whose result is not finite.*Load the model anew"):
        written(broken, policy=PLAIN)


@needs_lookups
@needs_compiler
def test_scales_of_zero_are_weights_of_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    target = attach(quantized("int8", "intx 4", num_hidden_layers=1))
    (layer,) = target.model.layers
    for own in (layer.mlp.down_proj, layer.self_attn.o_proj):  # one of each format
        own.weight.scale.zero_()
    assert written(target, policy=PLAIN, compile=True) == written(target, policy="plain")
    assert target.speculation_state.slot_engine.is_compiled


@needs_lookups
@needs_compiler
def test_a_compiled_and_prepacked_target_saves_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    sizes = SIZES | {"num_hidden_layers": 1}
    Architecture("qwen2", sizes).build("sdpa").bfloat16().save_pretrained(tmp_path / "target")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    with torch.no_grad():
        expected = target(PROMPT).logits
    written(prepack(attach(target)), policy=PLAIN, compile=True)
    target.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(PROMPT).logits, expected)
        assert torch.equal(unprepack(detach(target))(PROMPT).logits, expected)


@needs_lookups
@needs_compiler
@pytest.mark.parametrize("is_rounded", [True, False])
def test_compiled_drafts_read_int8_weights_unless_the_head_says_no(
    is_rounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    asked = list[tuple[nn.Module, int]]()

    def refused(module: nn.Module, job: packages.CompileJob, *_: object) -> None:
        asked.append((module, job.bits))
        raise RuntimeError("planted")

    monkeypatch.setattr(packages, "_compile", refused)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # without packages
    target = attach(Architecture("qwen2", SIZES).build("sdpa").bfloat16())
    head = DraftHead.from_target(target).eval()
    head.is_rounded = is_rounded
    written(target, assistant_model=head, policy=FixedPolicy(TreeShape(6, 2, 2)), compile=True)
    assert {bits for module, bits in asked if module is not target} == {8 if is_rounded else 16}
