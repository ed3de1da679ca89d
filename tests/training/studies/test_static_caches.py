"""The measurement of static caches: what is counted, and that every way writes the same text."""

import itertools

import torch

from tests.targets import Architecture
from training.studies.static_caches import WAYS, CacheTiming, StaticBench, table
from transformers_resps import DraftHead, TreeShape, attach


def test_every_way_writes_the_same_tokens_and_is_timed() -> None:
    target = attach(Architecture("llama").build("sdpa"))
    clock = itertools.count()
    head, shape = DraftHead.from_target(target), TreeShape(6, 2, 3)
    bench = StaticBench(target, head, shape, 6, None, lambda: float(next(clock)))
    runs = list(bench.run([torch.arange(3, 3 + length) for length in (4, 7)], repeats=1))
    assert {m.way for m in runs} == {way for way in WAYS if not way.endswith("compiled")}
    assert len(runs) == 2 * 2 * 4  # passes, prompts, ways
    assert all(m.same and m.tokens == 6 and m.seconds == 1.0 for m in runs)


def test_the_first_pass_counts_for_compiling_alone() -> None:
    runs = [
        CacheTiming("plain, dynamic", 0, -1, 10, 5.0, True),
        CacheTiming("plain, dynamic", 0, 0, 10, 5.0, True),
        CacheTiming("tree, dynamic", 0, -1, 10, 4.0, True),
        CacheTiming("tree, dynamic", 0, 0, 10, 4.0, True),
        CacheTiming("tree, compiled", 0, -1, 10, 62.0, True),
        CacheTiming("tree, compiled", 0, 0, 10, 2.0, False),
    ]
    rows = {row["way"]: row for row in table(runs)}
    assert rows["tree, compiled"] == {
        "way": "tree, compiled",
        "tokens_per_second": 5.0,
        "to_plain": 2.5,
        "to_dynamic": 2.0,
        "same_text": 0.0,
        "first_pass_extra_seconds": 60.0,
    }
    assert rows["plain, dynamic"]["first_pass_extra_seconds"] == 0.0
