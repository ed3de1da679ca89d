"""The engine of all compiled code: what it takes for granted, what it checks, and when it does without."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import FakeClock
from transformers_resps.compilation.captured import CapturedFunction
from transformers_resps.compilation.engine import Code, CompileEngine, WeightFingerprint, disagreement


class Fast(CapturedFunction):
    """Passes for compiled code. Compiling takes a hundred seconds of `clock`; `fault` is what every run raises."""

    def __init__(self, function: Callable[..., Any], clock: FakeClock) -> None:
        self.function, self.clock = function, clock
        self.fault: BaseException | None = None
        self.change: Callable[[Any], Any] = lambda outputs: outputs
        self.runs = 0

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        return self.runs > 0

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        if not self.runs:
            self.clock.advance(100.0)
        self.runs += 1
        if self.fault is not None:
            raise self.fault
        return self.change(self.function(*inputs, *buffers))


class Engine(CompileEngine[nn.Linear]):
    """Runs a linear layer."""

    name, duration = "the layer", "A moment."

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.fast = Fast(lambda states: self.owner(states), clock)

    @property
    def module(self) -> nn.Module:
        return self.owner

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner)

    def layer(self, states: Tensor) -> Tensor | None:
        code = Code(self.fast.function, self.fast, lambda outputs: outputs, "outputs", torch.float32)
        found: Tensor | None = self.run(self.code("layer", lambda: code), [states], [])
        return found


@pytest.fixture
def engine(fake_clock: FakeClock) -> Engine:
    return Engine(fake_clock)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).requires_grad_(False)


STATES = torch.ones(2, 4)


def test_code_that_agrees_runs_and_its_seconds_are_told_once(engine: Engine, layer: nn.Linear) -> None:
    with engine.borrow(layer):
        for _ in range(2):
            found = engine.layer(STATES)
            assert found is not None and torch.equal(found, layer(STATES))
        assert engine.take_compile_seconds() == 100.0
        assert engine.take_compile_seconds() == 0.0 and engine.is_compiled


def test_code_that_gives_other_values_is_not_used(
    engine: Engine, layer: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fast.change = lambda outputs: outputs * 1.01
    with engine.borrow(layer):
        assert engine.layer(STATES) is None and engine.is_broken and not engine.is_compiled
    assert "The layer runs without compilation: its outputs differ from the eager ones" in caplog.text


COMPILERS = [
    torch._dynamo.exc.TorchDynamoException("a break in the graph"),
    torch.OutOfMemoryError("no memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    OSError("No space left on device"),
]


@pytest.mark.parametrize("when", ["compiling", "running"])
@pytest.mark.parametrize("fault", COMPILERS, ids=lambda fault: type(fault).__name__)
def test_what_compilers_and_allocators_raise_leaves_eager_code_and_one_warning(
    engine: Engine, layer: nn.Linear, fault: Exception, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.borrow(layer):
        if when == "running":
            assert engine.layer(STATES) is not None
        engine.fast.fault = fault
        assert engine.layer(STATES) is None and engine.is_broken
    assert ["The layer runs without compilation" in line for line in caplog.messages] == [True]
    assert engine.obstacle is not None and engine.obstacle in caplog.text


@pytest.mark.parametrize("when", ["compiling", "running"])
@pytest.mark.parametrize("fault", [TypeError("a bug"), AttributeError("a bug"), AssertionError("a bug")], ids=repr)
def test_a_bug_is_not_taken_for_a_compilers_fault(
    engine: Engine, layer: nn.Linear, fault: Exception, when: str
) -> None:
    with engine.borrow(layer):
        if when == "running":
            engine.layer(STATES)
        engine.fast.fault = fault
        with pytest.raises(type(fault), match="a bug"):
            engine.layer(STATES)
    assert not engine.is_broken


def test_what_the_eager_function_raises_is_no_compilers_fault_either(engine: Engine, layer: nn.Linear) -> None:
    with engine.borrow(layer), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.layer(torch.ones(2, 5))
    assert engine.fast.runs == 0 and not engine.is_broken


def test_other_weights_make_it_forget_its_code_and_its_faults(engine: Engine, layer: nn.Linear) -> None:
    with engine.borrow(layer):
        engine.layer(STATES)
    with engine.borrow(layer):
        assert engine.is_compiled
        engine.fast.fault = torch.OutOfMemoryError("no memory")
        engine.layer(STATES)
    with engine.borrow(layer):
        assert engine.is_broken
    layer.weight.mul_(2.0)
    with engine.borrow(layer):
        assert not engine.is_broken and not engine.is_compiled


def test_it_is_lent_to_one_call_at_a_time(engine: Engine, layer: nn.Linear) -> None:
    with engine.borrow(layer) as first, engine.borrow(layer) as second:
        assert first is engine and second is None
    with engine.borrow(layer) as later:
        assert later is engine


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.bfloat16)).eval()


def _add_in_place(one: nn.Module) -> None:
    with torch.no_grad():
        one[0].weight.add_(1.0)  # type: ignore[index, union-attr]


def _replace(one: nn.Module) -> None:
    one[0].weight = nn.Parameter(one[0].weight.detach().clone())  # type: ignore[index, union-attr]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda one: one.load_state_dict(one.state_dict()),
    "to another dtype": lambda one: one.double(),
    "in place": _add_in_place,
    "through data": lambda one: one[2].weight.data.mul_(2),  # type: ignore[index, union-attr]
    "another parameter": _replace,
    "training mode": lambda one: one.train(),
    "gradients": lambda one: one.requires_grad_(False),
    "a buffer": lambda one: one[1].running_mean.add_(1.0),  # type: ignore[index, union-attr]
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    one = module()
    before = WeightFingerprint(one)
    assert WeightFingerprint(one) == before
    CHANGES[name](one)
    assert WeightFingerprint(one) != before


def test_a_forward_changes_nothing_and_a_setting_counts() -> None:
    one = module()
    before = WeightFingerprint(one, "sdpa")
    one[0](torch.randn(2, 4))
    assert WeightFingerprint(one, "sdpa") == before
    assert WeightFingerprint(one, "eager") != before
    assert before != "sdpa"


def test_weights_that_are_not_numbers_are_equal_to_themselves() -> None:
    one = nn.Linear(2, 2)
    one.weight.data.fill_(float("nan"))
    assert WeightFingerprint(one) == WeightFingerprint(one)


def logits() -> Tensor:
    return torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.05), (torch.float32, 1e-4), (torch.float64, 5e-7)])
def test_rounding_of_the_dtype_agrees_and_ten_times_as_much_does_not(dtype: torch.dtype, noise: float) -> None:
    expected, errors = logits().double(), logits().flip(-1)
    assert disagreement(expected + noise * errors, expected, dtype) is None
    assert disagreement(expected + 10 * noise * errors, expected, dtype) is not None


def test_a_single_value_that_is_far_off_is_rounding_in_low_precision() -> None:
    expected = logits().bfloat16()
    found = expected.clone()
    found[0, 1, 7] += expected.abs().max()
    assert disagreement(found, expected, torch.bfloat16) is None


def test_rows_in_another_order_and_nan_disagree() -> None:
    expected = logits().bfloat16()
    assert (
        disagreement(expected.flip(1), expected, torch.bfloat16) == "differ from the eager ones by 1.1 of their norm"
    )
    assert disagreement(expected * float("nan"), expected, torch.bfloat16) is not None
