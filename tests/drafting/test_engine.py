"""Drafts as one launch, kept as long as their head lives. A fake capture runs what a CUDA graph would."""

import copy
import gc
import weakref
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
from transformers_resps.drafting.engine import DraftEngine, DraftEngines
from transformers_resps.heads import BoundHead
from transformers_resps.verifying.slots.verifier import SlotVerifier


class FakeCapture(CapturedFunction):
    """Keeps inputs and outputs of each size where they are, as a graph does, and forgets them with the buffers."""

    launches = captures = 0
    fault: Exception | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.places = function, list[int]()
        self.kept: dict[Any, tuple[list[Tensor], tuple[Tensor, ...]]] = {}

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        places = [part.data_ptr() for part in buffers]
        return places == self.places and tuple(part.shape for part in inputs) in self.kept

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        if FakeCapture.fault is not None:
            raise FakeCapture.fault
        key = tuple(part.shape for part in inputs)
        if not self.is_ready(inputs, buffers):
            FakeCapture.captures += 1
            places = [part.data_ptr() for part in buffers]
            if places != self.places:
                self.kept, self.places = {}, places
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
    monkeypatch.setattr(SlotVerifier, "is_compiled", property(lambda self: True, lambda self, value: None), False)
    target = attach(Architecture("llama").build("sdpa"))
    target.speculation_state.draft_engines = DraftEngines(lambda: DraftEngine(FakeCapture))
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


@pytest.mark.parametrize(
    ("rows", "do_sample", "window"), [(1, False, None), (1, True, 16), (3, False, 16), (3, True, None)]
)
def test_a_step_drafts_with_one_launch_what_levels_would(
    target: PreTrainedModel,
    head: DraftHead,
    rows: int,
    do_sample: bool,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head.config.sliding_window = window
    at_once, report = speculate(target, head, 5, rows, do_sample=do_sample)
    launches, captures = FakeCapture.launches, FakeCapture.captures
    assert launches >= len(report.steps) - 3 and captures <= 6 * rows  # each number of pairs is another
    target.speculation_state.draft_engines = DraftEngines(lambda: DraftEngine(FakeCapture))
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
    outgrown = FakeCapture.captures
    assert text[0] == expected[0].tolist() and outgrown >= 2 and report.tau > 1.0
    head.config.sliding_window = 64
    assert speculate(target, head, 1, 1, max_new_tokens=240)[0] == text
    assert FakeCapture.captures == outgrown  # the cache that has grown serves a window of any text


def test_a_capture_that_fails_leaves_levels_and_one_warning(
    target: PreTrainedModel, head: DraftHead, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeCapture, "fault", torch.OutOfMemoryError("no memory"))
    expected = target.generate(**prompts(2, rows=1), max_new_tokens=40, do_sample=False)
    for _ in range(2):
        text, _ = speculate(target, head, 2, 1)
        assert text == expected.tolist()
    reason = "The draft head runs without compilation: OutOfMemoryError: no memory."
    assert [line for line in caplog.messages if "compilation" in line] == [reason]


def lent(engines: DraftEngines, head: DraftHead, target: PreTrainedModel) -> DraftEngine | None:
    with engines.borrow(head, BoundHead(head, target)) as engine:
        return engine


def test_heads_that_take_turns_keep_their_engines_and_a_copy_of_the_model_starts_anew(
    target: PreTrainedModel,
) -> None:
    engines, heads = DraftEngines(), [DraftHead.from_target(target) for _ in range(5)]
    first = [lent(engines, head, target) for head in heads]
    assert len(set(first)) == 5
    assert [lent(engines, head, target) for head in heads] == first
    assert lent(copy.deepcopy(engines), heads[0], target) is not first[0]


def test_no_engine_is_lent_twice_or_where_angles_depend_on_the_length(
    target: PreTrainedModel, head: DraftHead
) -> None:
    engines, bound = DraftEngines(), BoundHead(head, target)
    with engines.borrow(bound.head, bound) as engine, engines.borrow(bound.head, bound) as second:
        assert engine is not None and second is None
    head.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with engines.borrow(head, BoundHead(head, target)) as engine:
        assert engine is None


def test_a_head_that_the_caller_drops_is_freed_with_its_captured_drafts(target: PreTrainedModel) -> None:
    def of_a_call() -> list[weakref.ref[Any]]:
        head = DraftHead.from_target(target)
        speculate(target, head, 1, 1)
        assert FakeCapture.captures
        return [weakref.ref(head), weakref.ref(lent(target.speculation_state.draft_engines, head, target))]

    references = of_a_call()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
