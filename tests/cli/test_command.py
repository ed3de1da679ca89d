"""`resps` as a user types it."""

import subprocess
import sys

import pytest

from transformers_resps import cli
from transformers_resps.bench.config import BenchConfig


@pytest.mark.parametrize("command", ["doctor", "inspect", "calibrate", "verify", "bench"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"resps {command}" in capsys.readouterr().out


def test_a_command_returns_the_status_of_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchConfig] = []
    monkeypatch.setattr("transformers_resps.bench.__main__.run", lambda config: seen.append(config) or 1)
    assert cli.main(["bench", "target", "head", "--dataset", "x.jsonl"]) == 1
    assert seen == [BenchConfig("target", "head", ["x.jsonl"])]


@pytest.mark.parametrize(
    "words",
    [
        "doctor target head --answers 0",
        "doctor target head --max-length -3",
        "verify target --prompts 0",
        "verify target --seeds 0",
        "inspect target --prompt x --output x.html --max-new-tokens 0",
        "doctor target head --dtype float17",
        "verify target --device gpu",
        "verify target --device meta",
        "calibrate target --dtype float8_e4m3fn",
        "bench target head --dataset x.jsonl --dtype float17",
        "bench target head --dataset x.jsonl --temperature 0 nan",
        "inspect target --prompt x --output x.html --temperature -1",
        "verify ./not/there",
        "calibrate target /not/there",
        "doctor owner/name owner/name/head",
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_loaded(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    assert " is no " in capsys.readouterr().err


def test_asking_for_help_needs_no_extra() -> None:
    code = """
import sys
sys.modules.update(rich=None, gguf=None, trl=None, datasets=None)
from transformers_resps.cli import main
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
