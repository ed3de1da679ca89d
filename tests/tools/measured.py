"""Measurements made up by hand: two datasets of three prompts, and the results of them."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from transformers_resps import StepRecord, TreeShape
from transformers_resps.telemetry import RowCounts
from transformers_resps.tools.results import AnswerTiming, Run, plain_spread, summarise_steps, summary_rows


EFFORTS = {"plain": 0, "prompt lookup": 1, "tree 8/3/2": 3, "auto": 4}
ORACLE = "oracle (ceiling)"


def made_up(temperatures: tuple[float, ...] = (0.0,)) -> list[Run]:
    """The tree twice as fast as plain decoding, auto three times."""
    runs = []
    for temperature in temperatures:
        for prompt in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
            for name, forwards, seconds in zip(EFFORTS, (12, 10, 6, 5), (12.0, 11.0, 6.0, 4.0), strict=True):
                m = AnswerTiming(name, prompt, 0, 12, forwards, seconds, 1, temperature, 1.0)
                runs.append(Run(m, torch.arange(12), steps_for(name)))
    return runs


def step(shape: TreeShape, verified: int, emitted: int, draft: float, verify: float, seconds: float) -> StepRecord:
    return StepRecord(
        shape, verified, verified, RowCounts([emitted - 1]), RowCounts([emitted]), draft, verify, seconds
    )


def steps_for(name: str) -> list[StepRecord]:
    plain = TreeShape.plain()
    prefill = step(plain, 1, 1, 0.0, 0.8, 1.0)
    if name == "tree 8/3/2":
        return [prefill] + [step(TreeShape(8, 3, 2), 8, 2, 0.2, 0.6, 0.9)] * 5
    if name == "auto":
        large = step(TreeShape(17, 5, 4, 2), 12, 4, 0.2, 0.4, 0.7)
        return [prefill, step(plain, 1, 1, 0.0, 0.5, 0.6)] + [large] * 3
    return []


def results_of(runs: Sequence[Run], names: Sequence[str] = tuple(EFFORTS)) -> dict[str, Any]:
    """What is written of these runs, with an estimate of an oracle that needs 3.2 seconds for each answer."""
    timings = [run.timing for run in runs]
    plain = [m for m in timings if m.method == "plain"]
    told = {name: [run for run in runs if run.timing.method == name and run.steps] for name in names}
    return {
        "schema_version": 2,
        "target": "work/tiny",
        "head": "runs/chat/head",
        "dtype": "float32",
        "device": "Ash Tray 9",
        "settings": {"temperatures": sorted({m.temperature for m in timings})},
        "same_text": dict.fromkeys(names, 6),
        "costs": {"verify": {"128": {"1": 0.01, "8": 0.02}, "768": {"1": 0.02, "8": 0.03}}, "draft": {"1": 0.001}},
        "plain_spread": plain_spread(timings),
        **summary_rows(timings, names, [replace(m, method=ORACLE, seconds=3.2) for m in plain]),
        "steps": {name: summarise_steps(own) for name, own in told.items() if own},
        "measurements": [asdict(timing) for timing in timings],
    }
