"""Drafts as one launch: a fake capture runs what a CUDA graph would, over inputs and outputs that stay in place."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from tests.decoding.rows import prompts
from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compilation.captured import CapturedFunction
from transformers_resps.drafting.levels import DraftEngine, DraftEngines
from transformers_resps.verifying.verifier import SlotTreeVerifier


class FakeCapture(CapturedFunction):
    """Keeps inputs and outputs of each size where they are, as a graph does, and forgets them with the buffers."""

    launches = captures = 0
    fault: Exception | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.places = function, list[int]()
        self.kept: dict[Any, tuple[list[Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        if FakeCapture.fault is not None:
            raise FakeCapture.fault
        key, places = tuple(part.shape for part in inputs), [part.data_ptr() for part in buffers]
        if places != self.places:
            self.kept, self.places = {}, places
        if key not in self.kept:
            FakeCapture.captures += 1
            own = [part.clone() for part in inputs]
            self.kept[key] = own, self.function(*own, *buffers)
        own, outputs = self.kept[key]
        torch._foreach_copy_(own, list(inputs))
        for place, value in zip(outputs, self.function(*own, *buffers), strict=True):
            place.copy_(value)
        FakeCapture.launches += 1
        return outputs


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Its steps run over slots, as they are, and pass for compiled."""
    monkeypatch.setattr(FakeCapture, "launches", 0)
    monkeypatch.setattr(FakeCapture, "captures", 0)
    monkeypatch.setattr(FakeCapture, "fault", None)
    monkeypatch.setattr(SlotTreeVerifier, "is_compiled", property(lambda self: True, lambda self, value: None), False)
    target = attach(Architecture("llama").build("sdpa"))
    target.speculation_state.draft_engines = DraftEngines(lambda: DraftEngine(FakeCapture, lambda bound: True))
    return target


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


def speculate(target: PreTrainedModel, head: DraftHead, seed: int, rows: int, **options: Any) -> Any:
    call = {"max_new_tokens": 40, "assistant_model": head, "policy": FixedPolicy(TreeShape(12, 3, 4))} | options
    set_seed(seed)
    found = target.generate(
        **prompts(seed, rows=rows), **call, cache_implementation="static", return_dict_in_generate=True
    )
    return found.sequences.tolist(), found.speculation


@pytest.mark.parametrize(("rows", "do_sample"), [(1, False), (1, True), (3, False), (3, True)])
def test_a_step_drafts_with_one_launch_what_levels_would(
    target: PreTrainedModel, head: DraftHead, rows: int, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, report = speculate(target, head, 5, rows, do_sample=do_sample)
    launches, captures = FakeCapture.launches, FakeCapture.captures
    assert launches >= len(report.steps) - 3 and captures <= 6 * rows  # each number of pairs is another
    target.speculation_state.draft_engines = DraftEngines(lambda: DraftEngine(FakeCapture, lambda bound: True))
    monkeypatch.setattr(FakeCapture, "fault", torch.OutOfMemoryError("no memory"))
    by_levels, _ = speculate(target, head, 5, rows, do_sample=do_sample)
    assert at_once == by_levels and FakeCapture.launches == launches


def test_later_calls_find_the_captures_of_earlier_ones(target: PreTrainedModel, head: DraftHead) -> None:
    speculate(target, head, 1, 1)
    first = FakeCapture.captures
    speculate(target, head, 1, 1)
    assert FakeCapture.captures == first
    head.norm.weight.data.mul_(1.5)
    speculate(target, head, 1, 1)
    assert FakeCapture.captures > first


def test_a_text_that_outgrows_the_cache_is_captured_anew(target: PreTrainedModel, head: DraftHead) -> None:
    text, report = speculate(target, head, 1, 1, max_new_tokens=240)
    expected = target.generate(**prompts(1, rows=1), max_new_tokens=240, do_sample=False)
    assert text[0] == expected[0].tolist() and FakeCapture.captures >= 2 and report.tau > 1.0


def test_a_capture_that_fails_leaves_levels_and_one_warning(
    target: PreTrainedModel, head: DraftHead, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeCapture, "fault", torch.OutOfMemoryError("no memory"))
    expected = target.generate(**prompts(2, rows=1), max_new_tokens=40, do_sample=False)
    for _ in range(2):
        text, _ = speculate(target, head, 2, 1)
        assert text == expected.tolist()
    assert len([line for line in caplog.messages if "without a CUDA graph" in line]) == 1
