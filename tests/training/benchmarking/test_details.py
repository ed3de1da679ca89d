from dataclasses import replace

import pytest
import torch

from benchmarking.details import same_texts, shapes_chosen
from tests.tools.measured import EFFORTS, made_up, steps_for
from transformers_resps.tools.results import Run


def test_two_methods_are_compared_on_texts_that_both_wrote_alike() -> None:
    runs = made_up()
    slow = [run for run in runs if run.timing.method == "auto" and run.timing.prompt != "a/0"]
    for run in slow:  # five texts of its own, which took it long
        runs[runs.index(run)] = Run(replace(run.timing, seconds=90.0), torch.zeros(12), run.steps)
    found = {(row["method"], row["base"]): row for row in same_texts(runs, list(EFFORTS))}
    assert found["tree 8/3/2", "prompt lookup"]["texts"] == 6
    assert found["tree 8/3/2", "prompt lookup"]["ratio"] == pytest.approx(11 / 6)
    own = found["auto", "plain"]
    assert (own["texts"], own["of"], own["ratio"]) == (1, 6, 3.0)
    assert ("plain", "auto") not in found


def test_the_most_frequent_shapes_are_told() -> None:
    assert shapes_chosen([steps_for("auto")] * 6) == {"17/5/4+2": 18, "plain": 6}
