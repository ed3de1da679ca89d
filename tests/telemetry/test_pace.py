"""A neighbour on the cores is told of once, and nothing else that makes steps slower."""

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.telemetry.pace import Pace
from transformers_resps.verifying.growing import TreeVerifier


def step(seconds: float, nodes: int = 1) -> StepRecord:
    shape = TreeShape.plain() if nodes == 1 else TreeShape(nodes, nodes - 1, 1)
    return StepRecord(shape, nodes - 1, nodes, RowCounts([0]), RowCounts([1]), 0.0, seconds, seconds)


def warnings_of(pace: Pace, calls: list[list[float]], caplog: Any, *, threads: int = 2, context: int = 100) -> int:
    """How often it warns in these calls, each of the seconds of its steps; every third step verifies four nodes."""
    caplog.clear()
    for seconds in calls:
        for place, one in enumerate(seconds):
            nodes = 4 if place % 3 == 0 else 1
            pace.see(step(one * (1.0 + 0.1 * (nodes - 1)), nodes), context, threads, "here")
    return sum("other processes use the cores" in record.message for record in caplog.records)


def test_a_neighbour_that_comes_after_thirty_steps_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace()
    assert warnings_of(pace, [[1.0] * 30], caplog) == 0
    assert warnings_of(pace, [[1.0] * 30 + [10.0] * 40, [10.0] * 40], caplog) == 1
    assert "Steps take 10 times as long as they did, with 2 threads" in caplog.text
    assert "`torch.set_num_threads(1)`" in caplog.text


def test_a_neighbour_that_was_there_in_the_whole_call_is_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(Pace(), [[1.0] * 30, [50.0] * 30], caplog) == 1


@pytest.mark.parametrize(
    "seconds",
    [
        [1.0] * 30 + [1000.0] + [1.0] * 30,
        ([1.0] * 9 + [100.0] * 3) * 8,
        [1.0] * 30 + [2.0] * 60,
        [1.0 + 0.02 * place for place in range(100)],
        [10.0] * 60,
        [10.0] * 30 + [1.0] * 60,
        [1e-9, 0.0, -1.0] + [1.0] * 60,
    ],
    ids=["one slow step", "interruptions", "twice", "ever slower", "from the first step on", "it left", "odd clock"],
)
def test_nothing_is_said_of(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(Pace(), [seconds], caplog) == 0


def test_nothing_is_said_of_one_thread(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(Pace(), [[1.0] * 30 + [10.0] * 40], caplog, threads=1) == 0


def test_a_longer_context_has_costs_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace()
    assert warnings_of(pace, [[1.0] * 40], caplog, context=100) == 0
    assert warnings_of(pace, [[8.0] * 40], caplog, context=30_000) == 0
    assert warnings_of(pace, [[80.0] * 40], caplog, context=30_000) == 1


def test_sizes_that_were_never_seen_are_no_evidence(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace()
    for nodes in [1] * 30 + list(range(2, 40)):
        pace.see(step(1.0 if nodes == 1 else 20.0, nodes), 100, 2, "here")
    assert not caplog.records


def test_generate_warns_when_its_steps_become_ten_times_as_slow(
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    prompt: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target: Any = attach(tiny_target)
    clock, verify, times = FakeClock(), TreeVerifier.verify, [1.0]

    def slow(self: TreeVerifier, tree: Any) -> Any:
        clock.advance(times[0])
        return verify(self, tree)

    monkeypatch.setattr(TreeVerifier, "verify", slow)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    caplog.set_level(logging.WARNING, "transformers")
    options = {"policy": FixedPolicy(TreeShape.plain()), "max_new_tokens": 20, "min_new_tokens": 20}
    for seconds, count in ((1.0, 0), (1.0, 0), (10.0, 1), (10.0, 1)):
        times[0] = seconds
        target.generate(**prompt, assistant_model=tiny_head, **options)
        assert caplog.text.count("other processes use the cores") == count
