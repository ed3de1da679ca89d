from dataclasses import replace

import pytest
import torch

from benchmarking.details import BUCKETS, bucket_of, same_texts, sizes_and_shapes
from tests.tools.measured import EFFORTS, made_up, step, steps_for
from transformers_resps import TreeShape
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


def test_sizes_are_counted_by_eight_steps() -> None:
    steps = [step(TreeShape.plain(), nodes, 1, 0, 0, 1) for nodes in [1, *[8] * 9]]
    assert sizes_and_shapes([steps])["sizes"] == [[0, 0, 8, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_the_most_frequent_shapes_are_told() -> None:
    found = sizes_and_shapes([steps_for("auto")] * 6)
    assert found == {"sizes": [[6, 0, 0, 18, 0, 0]], "shapes": {"17/5/4+2": 18, "plain": 6}}


@pytest.mark.parametrize(
    ("nodes", "bucket"),
    [(1, "plain"), (2, "2 to 4"), (4, "2 to 4"), (5, "5 to 8"), (16, "9 to 16"), (33, "above 32")],
)
def test_nodes_fall_into_buckets(nodes: int, bucket: str) -> None:
    assert BUCKETS[bucket_of(nodes)] == bucket
