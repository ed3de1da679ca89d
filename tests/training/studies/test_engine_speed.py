"""The measurement of the engine: what is compared, and that every way writes the plain text."""

import json
from pathlib import Path

import pytest

from training.studies.engine_speed import EngineRun, main, table, ways_of
from training.studies.random_target import random_target
from transformers_resps import DraftHead, TreeShape
from transformers_resps.tools.results import AnswerTiming


def test_a_benchmark_of_a_tiny_engine_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--shape tiny --tau 2 3 --eager --accept-noise --dtype float32 --limit 2 --repeats 1 --max-new-tokens 8"
    assert main([*words.split(), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    drafted = [
        f"{way}, tau {tau}"
        for tau in (2, 3)
        for way in (f"tree {2 * tau}/{2 * tau - 1}/1", f"tree 16/{2 * tau - 1}/4", "auto")
    ]
    assert [row["way"] for row in found["rows"]] == ["plain", "prompt lookup", *drafted]
    assert all(row["same_text"] == 1.0 for row in found["rows"])
    assert [row["planted"] for row in found["rows"]] == [None, None, 2.0, 2.0, None, 3.0, 3.0, None]
    assert found["noise"]["accepted"] and found["not_compiled"] == {"tiny": "Left out by --eager."}
    assert {"commit", "device", "threads", "dtype", "plain_spread"} <= found.keys()
    assert len(found["runs"]) == 8 * (1 + 2) and "| tiny | tree 16/5/4, tau 3 |" in capsys.readouterr().out


def test_hybrids_write_the_plain_text_without_what_they_lack(tmp_path: Path) -> None:
    """Transformers' prompt lookup."""
    words = "--shape tiny-gdn tiny-mamba2 --tau 2.5 --trees 6,3,2 --eager --accept-noise --dtype float32 --limit 1"
    assert main([*words.split(), *["--repeats", "1", "--max-new-tokens", "12", "--output"], str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    ways = ["plain", "tree 5/4/1, tau 2.5", "tree 6/3/2, tau 2.5", "auto, tau 2.5"]
    assert [row["way"] for row in found["rows"]] == ways * 2
    assert all(row["same_text"] == 1.0 for row in found["rows"])


def test_every_way_of_ours_is_also_compiled() -> None:
    target = random_target("tiny")
    shapes = [TreeShape(4, 3, 1), TreeShape(60, 3, 10)]
    ways = ways_of({2.0: DraftHead.from_target(target)}, {2.0: shapes}, compiles=True)
    assert [way.method.name for way in ways] == [
        "plain", "plain, compiled", "prompt lookup", "tree 4/3/1, tau 2", "tree 4/3/1, tau 2, compiled",
        "tree 60/3/10, tau 2", "tree 60/3/10, tau 2, compiled", "auto, tau 2", "auto, tau 2, compiled",
    ]  # fmt: skip
    for way in ways:
        assert way.method.keywords.get("compile", False) == way.method.name.endswith(", compiled")


def test_efficiency_is_the_share_of_tau_that_became_speed_against_each_plain() -> None:
    runs = [
        EngineRun("tiny", None, AnswerTiming("plain", "r/0", 0, 12, 12, 12.0), True),
        EngineRun("tiny", None, AnswerTiming("plain, compiled", "r/0", 0, 12, 12, 8.0, prefill_seconds=1.0), True),
        EngineRun("tiny", 3.0, AnswerTiming("tree 4/3/1, compiled", "r/0", -1, 12, 4, 90.0), False),
        EngineRun("tiny", 3.0, AnswerTiming("tree 4/3/1, compiled", "r/0", 0, 12, 4, 4.0, prefill_seconds=2.0), True),
    ]
    rows = {row["way"]: row for row in table(runs)}
    tree = rows["tree 4/3/1, compiled"]
    assert (tree["tau"], tree["ratio"], tree["compiled_ratio"]) == (3.0, 3.0, 2.0)
    assert tree["efficiency"] == 1.0 and tree["compiled_efficiency"] == pytest.approx(2 / 3)
    assert tree["same_text"] == 1.0 and rows["plain, compiled"]["ratio"] == 1.5
