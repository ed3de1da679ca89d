"""AIPerf is asked once for each category, of a server that drafts a fixed tree; a script stands for AIPerf."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from transformers import PreTrainedModel

from tests.tools.conversations import save_models
from training.evidence.prompts import CATEGORIES
from training.studies import server_acceptance
from transformers_resps import DraftHead


@pytest.fixture
def aiperf(tmp_path: Path) -> Path:
    """Keeps how it was called, and the rows that it was given."""
    script = tmp_path / "aiperf"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n"
        "given = dict(zip(sys.argv[2::2], sys.argv[3::2]))\nfile = given.get('--input-file')\n"
        "rows = [json.loads(line) for line in open(file)] if file else []\n"
        f"with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as calls:\n"
        "    calls.write(json.dumps([sys.argv[1:], rows]) + '\\n')\n"
        "if sys.argv[1] == 'speed-bench-report':\n    Path(sys.argv[-1]).write_text('the matrix')\n"
        "print('too late')\nsys.exit(3 if 'fail' in Path(sys.argv[0]).name else 0)\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def served(args: Any) -> Iterator[str]:
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(server_acceptance, "served", served)


@pytest.mark.usefixtures("unserved")
def test_every_category_is_a_run_with_its_own_rows(
    aiperf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["T", "H", "--aiperf", str(aiperf), "--limit", "2", "--output", str(tmp_path / "out")]
    assert server_acceptance.main(given) == 0
    assert capsys.readouterr().out.strip() == "the matrix"
    *profiles, (report, _) = map(json.loads, (tmp_path / "calls.jsonl").read_text().splitlines())
    assert report[:1] == ["speed-bench-report"]
    assert report[1:12] == [str(tmp_path / "out" / category) for category in CATEGORIES]
    for category, (arguments, rows) in zip(CATEGORIES, profiles, strict=True):
        assert arguments[0] == "profile" and f"speed_bench_{category}" in arguments
        assert [row["category"] for row in rows] == [category] * 2
        assert len({row["question_id"] for row in rows}) == 2 and all(len(row["question_id"]) == 32 for row in rows)
        assert all([message["role"] for message in row["messages"]] == ["user"] for row in rows)


@pytest.mark.usefixtures("unserved")
def test_what_aiperf_says_when_it_fails_is_told(
    aiperf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = aiperf.rename(aiperf.with_name("aiperf-fails"))
    with pytest.raises(SystemExit, match="2"):
        server_acceptance.main(["T", "H", "--aiperf", str(failing), "--output", str(tmp_path / "out")])
    assert "failed: too late" in capsys.readouterr().err


def test_the_server_of_the_study_drafts_the_fixed_tree(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead
) -> None:
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    args = server_acceptance.parser().parse_args([target, head, "--aiperf", "none", "--shape", "3,2,1"])
    asked = {"model": "target", "prompt": "defg", "max_tokens": 8}
    with server_acceptance.served(args) as address:
        body, kind = json.dumps(asked).encode(), {"content-type": "application/json"}
        with urlopen(Request(f"{address}/v1/completions", body, kind), timeout=60) as answer:
            told = json.load(answer)["metrics"]["speculative_decoding"]
    assert 0 < told["num_draft_tokens"] <= 2 * told["num_spec_steps"]
