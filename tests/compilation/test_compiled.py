"""Compiled functions: one code for all sizes, and never another module's weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels import needs_compiler, products_in_bfloat16
from transformers_resps.compilation import compiled as compiled_module
from transformers_resps.compilation import pages
from transformers_resps.compilation.compiled import CompiledFunction


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that compiles nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def through(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def function(rows: Tensor, buffer: Tensor) -> Tensor:
        buffer[: len(rows)] = rows
        return module(rows) + buffer.sum()  # type: ignore[no-any-return]

    return function


def compiled(module: nn.Module, backend: Any) -> CompiledFunction:
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return CompiledFunction(
        through(module), [(0,)], (0,), {"backend": backend, "fullgraph": True, "options": unguarded}
    )


@torch.no_grad()
def test_it_compiles_once_for_all_sizes_from_two_on_and_writes_its_buffers() -> None:
    backend, module = Counting(), nn.Linear(3, 2)
    function = CompiledFunction(through(module), [(0,)], (0,), {"backend": backend, "fullgraph": True})
    for rows, slots in ((2, 9), (5, 9), (4, 20), (7, 300)):
        states, buffer = torch.randn(rows, 3), torch.zeros(slots, 3)
        assert function.is_ready([states]) is (backend.count > 0)
        found = function([states], [buffer])
        torch.testing.assert_close(found, module(states) + states.sum())
        assert torch.equal(buffer[:rows], states)
    assert backend.count == 1
    assert not function.is_ready([torch.randn(1, 3)])


@torch.no_grad()
def test_weights_go_into_the_code_and_cpp_calls_the_kernels_but_not_in_what_callers_compile() -> None:
    config, seen = torch._inductor.config, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append((config.freezing, config.cpp_wrapper))
        return graph.forward

    before = config.freezing, config.cpp_wrapper
    CompiledFunction(through(nn.Linear(3, 2)), [(0,)], (0,), {"backend": backend})(
        [torch.ones(2, 3)], [torch.ones(9, 3)]
    )
    assert seen == [(True, True)]
    assert (config.freezing, config.cpp_wrapper) == before == (False, False)


@needs_compiler
@torch.no_grad()
def test_what_the_compiler_lays_out_is_moved_into_huge_pages_and_no_earlier_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = list[int]()

    def noted(tensors: Iterable[Tensor]) -> None:
        calls.append(sum(stop - start for start, stop in map(pages._span, tensors)))

    monkeypatch.setattr(compiled_module, "collapse", noted)
    for width in (96, 160):
        layer, states = nn.Linear(64, width), torch.randn(4, 64)
        found = CompiledFunction(lambda states, layer=layer: layer(states), [(0,)])([states])
        torch.testing.assert_close(found, layer(states), rtol=1e-4, atol=1e-5)
    weights = [4 * 64 * width for width in (96, 160)]
    assert all(weight <= moved < 2 * weight for moved, weight in zip(calls, weights, strict=True))


@needs_compiler
@torch.no_grad()
def test_code_that_was_made_for_some_sizes_serves_no_others() -> None:
    """PyTorch's own code asks for sizes, too: its kernels have limits."""
    function = CompiledFunction(lambda rows: rows.sum() * (2 if len(rows) > 9 else 1), [(0,)])
    for count, expected in ((4, 4), (9, 9), (10, 20), (5, 5)):
        assert function([torch.ones(count)]) == expected


@needs_compiler
@torch.no_grad()
def test_two_modules_of_the_same_lines_keep_their_own_weights() -> None:
    """Without guards on modules, code that is found by its lines alone would be the first module's."""
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    functions = [compiled(module, "inductor") for module in (first, second)]
    states = torch.randn(4, 3)
    for module, function in zip((first, second), functions, strict=True):
        torch.testing.assert_close(function([states], [torch.zeros(9, 3)]), module(states) + states.sum())


@pytest.mark.parametrize(
    "setting",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: one_more_thread(),
        products_in_bfloat16,
    ],
    ids=["inference mode", "autocast", "threads", "precision"],
)
@torch.no_grad()
def test_a_callers_other_settings_are_known_to_compile_anew(setting: Callable[[], Any]) -> None:
    """PyTorch guards compiled code by them. A step that takes it for ready would compile, and without freezing."""
    backend, states = Counting(), torch.randn(4, 3)
    function = CompiledFunction(through(nn.Linear(3, 2)), [(0,)], (0,), {"backend": backend, "fullgraph": True})
    function([states], [torch.zeros(9, 3)])
    with setting():
        assert not function.is_ready([states])
        function([states.clone()], [torch.zeros(9, 3)])
        assert backend.count == 2 and function.is_ready([states])
    function([states], [torch.zeros(9, 3)])
    assert backend.count == 2


@contextmanager
def one_more_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("is_invariant", [False, True])
def test_fused_operators_round_as_eager_ones_where_they_must(is_invariant: bool) -> None:
    """The real compiler, which else hands on what is not rounded yet."""

    def function(rows: Tensor, others: Tensor) -> Tensor:
        return (rows + others) * rows

    given = list(torch.randn(2, 8, 64).to(torch.bfloat16))
    found = CompiledFunction(function, [(0,), (0,)], is_invariant=is_invariant)(given)
    assert torch.equal(found, function(*given)) is is_invariant
