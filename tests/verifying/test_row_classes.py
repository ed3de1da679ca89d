"""The probe of row classes on layers whose classes are planted, and on models whose classes this machine decides."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.kernels import (
    RestRoundsOtherwise,
    deterministic_algorithms,
    one_more_thread,
    products_in_bfloat16,
    products_in_full_precision,
    without_onednn,
)
from transformers_resps import prepack
from transformers_resps.verifying.invariant import row_classes
from transformers_resps.verifying.invariant.attention import invariant_attention
from transformers_resps.verifying.invariant.row_classes import RowClasses, RowNeeds, least_rows


class Planted(nn.Linear):
    """Multiplies row by row, and moves the rows `wrong(count)` of a call by the last bit."""

    def __init__(self, wrong: Callable[[int], slice | None]) -> None:
        super().__init__(24, 40, bias=False)
        self.wrong, self.calls = wrong, 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        found = torch.stack([self.weight @ row for row in input[0]])
        rows = self.wrong(len(found))
        if rows is not None:
            found[rows] = found[rows].nextafter(torch.tensor(torch.inf))
        return found[None]


EXACT: Callable[[int], slice | None] = lambda count: None  # noqa: E731
ALL = slice(None)


def target_of(**layers: nn.Module) -> PreTrainedModel:
    """What the probe sees of a target."""
    target: Any = nn.Module()
    target.dtype, target.config = torch.float32, LlamaConfig(hidden_size=32, num_attention_heads=4)
    target.device = torch.device("cpu")
    for name, layer in layers.items():
        target.add_module(name, layer)
    return cast(PreTrainedModel, target)


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attends by row: this processor's own attention may need more rows than a planted layer."""
    monkeypatch.setattr(row_classes, "invariant_attention", lambda module, query, *_, **__: query)


planted = pytest.mark.usefixtures("attention_alone")


@planted
@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        (EXACT, 1),
        (lambda count: ALL if count == 1 else None, 2),
        (lambda count: ALL if count < 4 else None, 4),
        (lambda count: ALL if count < 8 else None, 8),
        (lambda count: slice(-1, None) if count % 4 == 1 else None, 2),  # 33 rows of PyTorch's attention on a CPU
        (lambda count: slice(-(count % 4), None) if count % 4 and count < 12 else None, 4),  # MKL on two threads
        (lambda count: slice(1, 2) if count in (6, 10) else None, 4),  # two rows of one call
        (lambda count: ALL if count == 65 else None, 2),
    ],
)
def test_a_planted_class_is_found(wrong: Callable[[int], slice | None], least: int) -> None:
    torch.manual_seed(0)
    assert RowClasses().needs(target_of(layer=Planted(wrong))).forward == least


@planted
@pytest.mark.parametrize(
    "wrong",
    [
        lambda count: ALL if count > 16 and count % 32 else None,  # AMX
        lambda count: slice(count // 2, None) if count > 16 else None,  # where a second thread begins
        lambda count: ALL if count != 16 else None,
    ],
)
def test_where_kernels_go_by_the_shape_one_number_of_rows_serves(wrong: Callable[[int], slice | None]) -> None:
    classes, layer = RowClasses(), Planted(wrong)
    assert classes.needs(target_of(layer=layer)) == RowNeeds(16, is_exact=True)
    calls = layer.calls
    assert classes.needs(target_of(layer=layer)) == RowNeeds(16, is_exact=True) and layer.calls == calls


@planted
@pytest.mark.parametrize(
    "wrong",
    [
        lambda count: slice(-1, None),
        lambda count: slice(0, None, 2),
        lambda count: slice(count // 2, None),
        lambda count: slice(3, 4),
    ],
)
def test_a_layer_that_rounds_by_the_place_is_refused_by_name(wrong: Callable[[int], slice | None]) -> None:
    target, classes = target_of(mlp=nn.ModuleDict({"down": Planted(wrong)})), RowClasses()
    wanted = (
        r"`mlp.down` \(Planted, 24 -> 40, torch.float32\) rounds a row by its place among 16 rows, or by the others\. "
        r"Load the model in float32"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=wanted):
            classes.needs(target)


@planted
def test_a_layer_that_rounds_by_the_other_rows_is_refused_too() -> None:
    """As one that scales its input by the largest value of them all."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            largest = input.abs().max()
            return super().forward(input / largest) * largest

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"`layer` \(Scaled"):
        RowClasses().needs(target_of(layer=Scaled(24, 40)))


def test_attention_that_rounds_by_the_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def placed(*given: Any, **options: Any) -> Any:
        found, _ = invariant_attention(*given, **options)
        found[:, -1] = found[:, -1].nextafter(torch.tensor(torch.inf))
        return found, None

    monkeypatch.setattr(row_classes, "invariant_attention", placed)
    with pytest.raises(ValueError, match=r"PyTorch's attention .* rounds a row by its place among 16 rows"):
        RowClasses().needs(target_of())


@planted
def test_probing_asks_for_few_products_since_each_may_wait_for_a_neighbour() -> None:
    """A product of two threads waits for the slower one: beside a busy core for tens of milliseconds."""
    several, exactly = Planted(EXACT), Planted(lambda count: ALL if count > 16 and count % 32 else None)
    RowClasses().needs(target_of(layer=several))
    RowClasses().needs(target_of(layer=exactly))
    assert several.calls <= 60 and exactly.calls <= 20


@planted
@pytest.mark.parametrize("bias", [False, True])
def test_another_order_of_a_sum_shows_although_bfloat16_rounds_it_away(bias: bool) -> None:
    """One row alone is summed by halves: of random results one in 10,000 differs."""

    class ByHalves(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            terms = input[0, :, None].float() * self.weight
            halves = terms.chunk(2, dim=-1) if len(terms) == 1 else (terms[..., ::2], terms[..., 1::2])
            total = halves[0].sum(dim=-1) + halves[1].sum(dim=-1)
            return (total if self.bias is None else total + self.bias.float()).to(input.dtype)[None]

    torch.manual_seed(0)
    layer = ByHalves(256, 8, bias=bias, dtype=torch.bfloat16)
    assert RowClasses().needs(target_of(layer=layer)).forward == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prepare", [lambda target: target, prepack], ids=["stock", "packed"])
def test_the_rows_found_are_enough_for_each_layer_of_a_model(
    make_target: Callable[..., PreTrainedModel], dtype: torch.dtype, prepare: Callable[[PreTrainedModel], Any]
) -> None:
    target: Any = prepare(make_target(hidden_act="gelu_pytorch_tanh").to(dtype))
    least = RowClasses().needs(target).forward
    states = 5 * torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = target.model.layers[1]
    with torch.no_grad():
        for part in (layer.mlp, layer.self_attn.k_proj, target.lm_head):
            together = part(states)
            for count in range(least, 40, least):
                for start in range(0, 96 - count, 9):
                    found = part(states[:, start : start + count].clone())
                    assert torch.equal(found, together[:, start : start + count])


@planted
def test_activations_are_tried_at_the_width_of_the_layer_that_reads_them() -> None:
    """In float32 the last values of a call, which fill no vector, are computed in another way (AVX2 and later)."""

    class LastValues(nn.ReLU):
        __module__ = nn.ReLU.__module__

        def forward(self, input: Tensor) -> Tensor:
            found = input.clone()
            found.view(-1)[found.numel() // 32 * 32 :] += 1
            return found

    exact = {"up": Planted(EXACT), "act": LastValues(), "down": Planted(EXACT)}
    assert RowClasses().needs(target_of(**exact)).forward == 4  # rows of 24 values


@planted
def test_layers_of_other_kinds_are_found() -> None:
    """GPT-2's, and those inside an adapter."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.base_layer = layer.in_features, layer.out_features, layer

    class PlantedConv1D(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row @ self.weight + (x.shape[1] < 3) for row in x[0]])[None]

    assert RowClasses().needs(target_of(first=PlantedConv1D(40, 24))).forward == 4
    alone = Planted(lambda count: ALL if count == 1 else None)
    assert RowClasses().needs(target_of(layer=Wrapped(alone))).forward == 2


def test_experts_are_tried_beside_the_linear_layers(make_target: Callable[..., PreTrainedModel]) -> None:
    target: Any = make_target("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert RowClasses().needs(target).forward < 16
    experts = target.model.layers[2].mlp.experts
    gate = experts._apply_gate
    experts._apply_gate = lambda rows: gate(rows) + (len(rows) < 9) * 1e-3
    assert RowClasses().needs(target).forward < 16  # of equal layers the first is tried
    experts = target.model.layers[0].mlp.experts
    experts._apply_gate = lambda rows: gate(rows) + (len(rows) < 9) * 1e-3
    assert RowClasses().needs(target).forward == 16


def test_attention_that_depends_on_its_rows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = lambda module, query, *_, **__: (query * query.amax(2, keepdim=True), None)  # noqa: E731
    monkeypatch.setattr(row_classes, "invariant_attention", scaled)
    wanted = r"PyTorch's attention \(4 heads over 4, of 8, torch.float32\) .* Use the attention of PyTorch as"
    with pytest.raises(ValueError, match=wanted):
        RowClasses().needs(target_of())


@pytest.mark.parametrize(("fewest", "least"), [(8, 1), (16, 16)])
def test_each_rest_of_query_rows_is_tried(fewest: int, least: int) -> None:
    """Three heads share keys: 4 tokens ask in 16 rows and 8 in 24, but 12 in 40, of which 32 stand apart."""
    target = target_of()
    target.config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    with RestRoundsOtherwise(fewest):
        assert RowClasses().needs(target) == RowNeeds(least)


SETTINGS = [one_more_thread, without_onednn, products_in_bfloat16, deterministic_algorithms]


@planted
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_was_found_is_kept_for_each_kind_of_layer_and_what_may_change_kernels(setting: Callable[[], Any]) -> None:
    layers = [Planted(lambda count: ALL if count == 1 else None) for _ in range(3)]
    classes, target = RowClasses(), target_of(first=layers[0], second=layers[1])
    assert classes.needs(target).forward == classes.needs(target).forward == 2
    calls = layers[0].calls
    assert calls and layers[1].calls == 0
    assert classes.needs(target_of(third=layers[2])).forward == 2 and layers[2].calls == 0
    with setting():
        assert classes.needs(target).forward == 2
    assert layers[0].calls == 2 * calls
    assert classes.needs(target).forward == 2 and layers[0].calls == 2 * calls


def test_the_least_precision_of_float32_products_is_told_by_its_default_name() -> None:
    known = row_classes.kernel_settings()
    with products_in_full_precision():
        assert row_classes.kernel_settings() == known and "ieee" in known.values()


@planted
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_packed_and_stock_layers_of_one_size_are_tried_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, layer, packed = RowClasses(), nn.Linear(24, 40), []
    classes.needs(target_of(layer=layer))
    forward = type(prepack(nn.Linear(1, 1))).forward
    noted = lambda self, input: packed.append(len(input[0])) or forward(self, input)  # noqa: E731
    monkeypatch.setattr(type(prepack(nn.Linear(1, 1))), "forward", noted)
    classes.needs(target_of(layer=prepack(layer)))
    assert packed


@planted
def test_a_new_adapter_is_tried_again_once_its_weights_are_not_zero() -> None:
    layer, classes = Planted(lambda count: ALL if count == 1 else None), RowClasses()
    alone = layer.wrong
    layer.wrong = EXACT
    nn.init.zeros_(layer.weight)
    assert classes.needs(target_of(layer=layer)).forward == 1
    layer.wrong = alone
    nn.init.ones_(layer.weight)
    assert classes.needs(target_of(layer=layer)).forward == 2


def test_a_later_call_runs_no_operator(tiny_target: PreTrainedModel) -> None:
    """Each call of `generate` asks, and all weights take as long to read as several steps."""
    ran = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(str(operation))
            return operation(*args, **kwargs or {})

    classes = RowClasses()
    with Noted():
        known = classes.needs(tiny_target)
        count = len(ran)
        assert classes.needs(tiny_target) == known
    reads = [name for name in ran[count:] if name != "aten.detach.default"]
    assert count and not reads


def test_the_probe_leaves_the_random_state_runs_no_hook_and_keeps_no_graph(tiny_target: PreTrainedModel) -> None:
    ran = list[int]()
    for part in tiny_target.modules():
        part.register_forward_hook(lambda *_: ran.append(1))
    before = torch.get_rng_state()
    RowClasses().needs(tiny_target)
    assert torch.equal(torch.get_rng_state(), before) and not ran
    assert all(weight.grad is None for weight in tiny_target.parameters())


def test_a_forward_over_chains_is_tried_by_the_same_function() -> None:
    sample = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def answer(rows: range) -> Tensor:
        asked.append((rows.start, len(rows)))
        return sample[: len(rows)].cumsum(dim=0) + (len(rows) < 3) * 1e-3

    asked = list[tuple[int, int]]()
    assert least_rows(answer, [1, 2, 3, 4, 8, 16, 32]) == 4
    assert {start for start, _ in asked} == {0}
    assert least_rows(lambda rows: sample[: len(rows)] * len(rows), [1, 2, 4, 8, 16, 32]) is None


def test_in_float64_nothing_is_tried_since_no_choice_depends_on_its_rounding() -> None:
    layer = Planted(lambda count: slice(-1, None))
    target: Any = target_of(layer=layer)
    target.dtype = torch.float64
    assert RowClasses().needs(target).forward == 1 and not layer.calls
