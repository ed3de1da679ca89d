"""Experts in the invariant mode: a token's result whatever stands beside it, equal to Transformers' up to rounding."""

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from transformers_resps.verifying.invariant.experts import (
    RoutedLayer,
    has_invariant_experts,
    invariant_experts,
    multiply_segments,
    routed_layers,
    use_invariant_experts,
)
from transformers_resps.verifying.invariant.row_classes import RowClasses


COUNT, CHOSEN, WIDTH = 8, 3, 128
DTYPES = [torch.bfloat16, torch.float32]
KNOWN = RowClasses()
# Plain, with a router of groups, transposed with biases and a gate of its own, without a gate.
CLASSES = ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "aria_text", "gpt_oss", "nemotron_h"]


@cache
def target(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": WIDTH, "num_hidden_layers": 1, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": CHOSEN}
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 192)
    sizes |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), COUNT)
    sizes |= {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 0}
    sizes |= {"layers_block_type": ["moe"]} if model_type == "nemotron_h" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=dtype).eval()
    for experts in experts_of(model):
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def routed(rows: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts of each and their weights; an expert may have many tokens, one or none."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(rows, COUNT - 1, generator=generator).pow(4).softmax(-1)  # the last expert gets none
    weights, chosen = gates.topk(CHOSEN, dim=-1)
    return torch.randn(rows, WIDTH, generator=generator).to(dtype), chosen, weights.to(dtype)


def changed_by_company(experts: Any, run: Any, rows: int = 40) -> int:
    """Tokens whose result has other bits when fewer stand beside them."""
    given = routed(rows, experts.down_proj.dtype)
    whole, changed = run(*given), 0
    parts = [(index, index + 1) for index in range(rows)] + [(0, 2), (5, 8), (7, 12), (rows // 2, rows - 1)]
    for start, stop in parts:
        alone = run(*(part[start:stop] for part in given))
        changed += int((alone != whole[start:stop]).any(-1).sum())
    same = run(*(part[:1].expand(rows * 3 // 4, -1).contiguous() for part in given))  # all go to the same experts
    return changed + int((same != whole[:1]).any(-1).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", CLASSES)
@torch.no_grad()
def test_the_result_of_a_token_does_not_depend_on_its_company(model_type: str, dtype: torch.dtype) -> None:
    model = target(model_type, dtype)
    (experts,) = experts_of(model)
    needs = KNOWN.needs(model)
    with use_invariant_experts(model, needs.forward):
        assert changed_by_company(experts, experts, needs.forward if needs.is_exact else 40) == 0


@torch.no_grad()
def test_lone_rows_and_the_stock_implementation_round_in_another_way() -> None:
    """The control, in float32: in bfloat16 so small products round alike here, whatever their rows."""
    model = target("mixtral", torch.float32)
    (experts,) = experts_of(model)
    tokens, weight = routed(40, torch.float32)[0], experts.gate_up_proj[0].t()
    if all(torch.equal(tokens[:rows] @ weight, (tokens @ weight)[:rows]) for rows in range(1, 5)):
        pytest.skip("on this machine any number of rows rounds alike")
    assert changed_by_company(experts, partial(invariant_experts, experts, least=1)) > 0
    assert model.config._experts_implementation == "grouped_mm"
    assert changed_by_company(experts, experts) > 0


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
@torch.no_grad()
def test_the_result_is_that_of_transformers_up_to_rounding(model_type: str, has_norm: bool) -> None:
    experts = copy.deepcopy(experts_of(target(model_type, torch.float32))[0]).double()
    experts.has_post_expert_norm = has_norm
    experts.post_expert_norm = nn.RMSNorm(WIDTH, dtype=torch.float64)
    given = routed(40, torch.float64)
    experts.config._experts_implementation = "batched_mm"
    torch.testing.assert_close(invariant_experts(experts, *given, least=4), experts(*given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("least", [1, 2, 4, 16])
def test_segments_are_multiplied_by_their_own_weights(least: int) -> None:
    rows, weights = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    for sizes in ([1, 0, 2, 6], [0, 0, 0, 9], [9, 0, 0, 0], [3, 3, 2, 1], [0, 1, 0, 0]):
        part = rows[: sum(sizes)]
        expected = torch.cat([piece @ weight for piece, weight in zip(part.split(sizes), weights, strict=True)])
        product = multiply_segments(part, weights, torch.tensor(sizes).cumsum(0), least)
        torch.testing.assert_close(product, expected)


@torch.no_grad()
def test_it_compiles_without_a_break() -> None:
    model = target("gpt_oss", torch.bfloat16)
    (experts,) = experts_of(model)
    with use_invariant_experts(model, 2):
        compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
        for rows in (1, 9):
            assert torch.equal(compiled(*routed(rows, torch.bfloat16)), experts(*routed(rows, torch.bfloat16)))


def test_the_name_of_the_implementation_changes_for_one_forward() -> None:
    for model_type in ("mixtral", "llama"):
        model = target(model_type, torch.float32)
        before = model.config._experts_implementation
        with pytest.raises(InterruptedError), use_invariant_experts(model, 3):
            assert model.config._experts_implementation != before
            raise InterruptedError
        assert model.config._experts_implementation == before
    with use_invariant_experts(model, 3):
        model.config._experts_implementation = "eager"
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("model_type", CLASSES)
@torch.no_grad()
def test_all_that_a_mixture_computes_can_be_tried_alone(model_type: str) -> None:
    model = target(model_type, torch.float32)
    layers = dict[str, list[RoutedLayer]]()
    for name, layer in routed_layers(model, 16):
        assert layer(torch.randn(2, 5, layer.in_features)).shape[:2] == (2, 5)
        layers.setdefault(name.rpartition(".")[2], []).append(layer)
    raised, lowered, activation = layers.pop("experts")
    (router,), (whole,) = layers.values()
    (experts,) = experts_of(model)
    rows, first = torch.randn(6, WIDTH), torch.zeros(6, 1, dtype=torch.long)
    expected = invariant_experts(experts, rows, first, torch.ones(6, 1), least=1)
    inner = activation(raised(rows) + (experts.gate_up_proj_bias[0] if experts.has_bias else 0))
    torch.testing.assert_close(lowered(inner) + (experts.down_proj_bias[0] if experts.has_bias else 0), expected)
    assert lowered.weight is not None and lowered.weight.shape == (WIDTH, 192)
    assert router.weight is not None and router.weight.shape == (COUNT, WIDTH)
    (block,) = (module for module in model.modules() if experts in module.children())
    expected = block(rows[None])
    torch.testing.assert_close(whole(rows), (expected[0] if isinstance(expected, tuple) else expected)[0])


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_experts_that_ask_no_interface_are_found(model_type: str) -> None:
    assert not has_invariant_experts(target(model_type, torch.float32))


def test_experts_that_the_interface_does_not_reach_are_found() -> None:
    model = copy.deepcopy(target("mixtral", torch.float32))
    assert has_invariant_experts(model)
    (experts,) = experts_of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert not has_invariant_experts(model), "quantized"
    model = copy.deepcopy(target("mixtral", torch.float32))
    experts_of(model)[0].config = copy.deepcopy(model.config)
    assert not has_invariant_experts(model), "another config"
