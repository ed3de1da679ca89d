"""Packed layers against `nn.Linear`: the same numbers, the same files, never stale."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.kernels import bytes_in_memory, mapped
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, prepack, unprepack
from transformers_resps.verifying import prepacking
from transformers_resps.verifying.prepacking import (
    PackedWeight,
    PackedWeights,
    PrepackedLinear,
    is_prepacked,
    packed_linear,
)


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 160)


def multiplies(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 60, 300])
def test_a_packed_layer_computes_what_it_computed_before(layer: nn.Linear, rows: int) -> None:
    x = torch.randn(2, rows, 96)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(prepack(layer)(x), before, rtol=1e-5, atol=1e-5)
        assert torch.equal(unprepack(layer)(x), before)


@pytest.mark.skipif(not multiplies(torch.bfloat16), reason="this processor has no units for bfloat16")
@pytest.mark.parametrize("rows", [1, 2, 8, 60])
def test_packed_layers_in_bfloat16_round_the_exact_product(layer: nn.Linear, rows: int) -> None:
    x = torch.randn(2, rows, 96).bfloat16()
    with torch.no_grad():
        exact = layer.bfloat16().double()(x.double())
        packed = prepack(layer.bfloat16())(x)
    assert is_prepacked(layer) and packed.dtype is torch.bfloat16
    torch.testing.assert_close(packed.double(), exact, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(layer: nn.Linear, dtype: torch.dtype) -> None:
    x = torch.randn(64, 96, dtype=dtype)
    layer.to(dtype)
    with torch.no_grad():
        together = prepack(layer)(x)
        for rows in (1, 2, 3, 5, 8, 13, 33):
            assert torch.equal(layer(x[:rows]), together[:rows])


def test_a_changed_weight_is_packed_again(layer: nn.Linear) -> None:
    x = torch.randn(3, 96)
    with torch.no_grad():
        before = prepack(layer)(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict({name: value / 2 for name, value in layer.state_dict().items()})
        torch.testing.assert_close(layer(x), before)
        layer.weight = nn.Parameter(torch.zeros(160, 96))
        torch.testing.assert_close(layer(x), layer.bias.expand(3, -1))


def test_packing_again_notices_a_write_that_tells_no_version(layer: nn.Linear) -> None:
    """As PEFT's merge writes, through `.data`."""
    x = torch.randn(3, 96)
    with torch.no_grad():
        before = prepack(layer)(x) - layer.bias
        layer.weight.data += layer.weight.data
        torch.testing.assert_close(prepack(layer)(x) - layer.bias, 2 * before)


def test_a_parametrised_weight_is_not_packed(layer: nn.Linear) -> None:
    x = torch.randn(3, 96)
    with torch.no_grad():
        wanted = layer(x)
        parametrize.register_parametrization(prepack(layer), "weight", nn.Identity())
        assert torch.equal(layer(x), wanted)


def test_gradients_flow_as_through_any_linear_layer(layer: nn.Linear) -> None:
    x = torch.randn(3, 96)
    layer(x).square().sum().backward()
    wanted = layer.weight.grad
    layer.weight.grad = None
    prepack(layer)(x).square().sum().backward()
    assert wanted is not None and torch.equal(layer.weight.grad, wanted)


def test_copies_and_pickles_of_a_packed_layer_work_and_carry_no_packed_weight(layer: nn.Linear) -> None:
    x = torch.randn(3, 96)
    with torch.no_grad():
        wanted = prepack(layer)(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.packed is not layer.packed and twin.packed._blocks is None
            assert torch.equal(twin(x), wanted)


def test_the_packed_weights_are_moved_into_huge_pages_together(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[list[torch.Tensor]]()
    monkeypatch.setattr(prepacking, "collapse", lambda tensors: calls.append(list(tensors)))
    module = prepack(nn.Sequential(layer, nn.ReLU(), nn.Linear(160, 8), nn.Linear(8, 8).double()))
    (moved,) = calls
    with torch.no_grad():
        module[:3](torch.randn(3, 96))
    assert [id(blocks) for blocks in moved] == [id(module[index].packed._blocks) for index in (0, 2)]


def test_other_dtypes_and_subclasses_are_left_alone(layer: nn.Linear) -> None:
    class Own(nn.Linear):
        pass

    module = prepack(nn.Sequential(layer.double(), Own(160, 8).double()))
    x = torch.randn(3, 96, dtype=torch.float64)
    with torch.no_grad():
        assert module(x).dtype is torch.float64
    assert type(module[1]) is Own
    assert not is_prepacked(module)


@pytest.mark.parametrize("shape", [TreeShape(6, 3, 2), TreeShape(9, 2, 8), TreeShape(2, 1, 1, lookup=5)], ids=str)
def test_a_packed_target_writes_the_same_text_with_a_tree_and_without(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor], shape: TreeShape
) -> None:
    target = attach(prepack(tiny_target))
    assert is_prepacked(target)
    plain = target.generate(**prompt, max_new_tokens=24, do_sample=False)
    tree = target.generate(
        **prompt, max_new_tokens=24, do_sample=False, assistant_model=tiny_head, policy=FixedPolicy(shape)
    )
    assert torch.equal(tree, plain)


def test_a_packed_target_is_saved_as_any_other(tiny_target: PreTrainedModel, tmp_path: Path) -> None:
    prepack(tiny_target).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_prepacked(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny_target.state_dict().items())


def linear_layers(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(part) for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def test_a_view_multiplies_by_packed_weights_and_its_module_stays_as_it_is(layer: nn.Linear) -> None:
    module, x = nn.Sequential(layer, nn.Sequential(nn.ReLU(), nn.Linear(160, 8))), torch.randn(3, 96)
    state, before = [dict(vars(part)) for part in module.modules()], linear_layers(module)
    view = PackedWeights().view(module)
    with torch.no_grad():
        torch.testing.assert_close(view(x), module(x), rtol=1e-5, atol=1e-5)
    assert linear_layers(view) == dict.fromkeys(before, PrepackedLinear) and linear_layers(module) == before
    assert [dict(vars(part)) for part in module.modules()] == state
    assert all(one is other for one, other in zip(view.parameters(), module.parameters(), strict=True))


def test_a_view_sees_new_weights_new_hooks_and_the_gradients_of_its_module(layer: nn.Linear) -> None:
    module, x = nn.Sequential(layer), torch.randn(3, 96)
    view, ran = PackedWeights().view(module), []
    view(x).sum().backward()
    assert layer.weight.grad is not None
    layer.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        layer.weight = nn.Parameter(torch.zeros(160, 96))
        torch.testing.assert_close(view(x), layer.bias.expand(3, -1))
    assert ran


def test_later_views_find_what_earlier_ones_packed_and_copies_and_pickles_pack_anew(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, pack = [], PackedWeight._pack
    monkeypatch.setattr(PackedWeight, "_pack", lambda self, weight: packed.append(weight) or pack(self, weight))
    weights, x = PackedWeights(), torch.randn(3, 96)
    with torch.no_grad():
        for _ in range(3):
            weights.view(layer)(x)
        assert len(packed) == 1
        for twin in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
            twin.view(layer)(x)
        assert len(packed) == 3


def test_what_cannot_be_packed_is_its_own_view(layer: nn.Linear) -> None:
    for module in (nn.Sequential(layer.double()), nn.ReLU(), prepack(nn.Linear(4, 4))):
        assert PackedWeights().view(module) is module


def test_layers_without_weights_work_as_before_and_what_is_no_module_is_refused() -> None:
    layer = prepack(nn.Linear(0, 4))
    with torch.no_grad():
        assert torch.equal(layer(torch.empty(2, 0)), layer.bias.expand(2, 4))
    with pytest.raises(ValueError, match="`prepack` needs a model, a head or another `nn.Module`, got None"):
        prepack(None)


def test_compiled_code_multiplies_by_rows_as_they_are() -> None:
    """The compiler packs weights itself, and knows no lowering of the packed product."""
    operations = list[str]()

    def noted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    weight, states = torch.randn(256, 128), torch.randn(3, 128)
    with torch.no_grad():
        multiply = packed_linear(weight)
        torch._dynamo.reset()
        found = torch.compile(lambda states: multiply(states), fullgraph=True, backend=noted)(states)
    torch._dynamo.reset()
    torch.testing.assert_close(found, states @ weight.T)
    assert operations and not any("mkldnn" in name for name in operations)


def test_weights_in_a_file_leave_memory_and_come_back_when_they_are_read(tmp_path: Path) -> None:
    values = torch.randn(1024, 1024)
    layer = nn.Linear(1024, 1024, bias=False)
    layer.weight = nn.Parameter(mapped(tmp_path, values))
    before = bytes_in_memory(layer.weight)
    prepack(layer)
    assert bytes_in_memory(layer.weight) < 0.1 * before
    assert torch.equal(unprepack(layer).state_dict()["weight"], values)
