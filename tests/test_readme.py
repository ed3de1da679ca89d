"""The README's quickstart, figures and picture are what the code and the results files give."""

import io
import json
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from examples.demo.target import prepared_target
from tests.readme import README, quickstart


ROOT = README.parent
HEADS = ("smollm2-135m-instruct-head", "qwen2.5-coder-0.5b-instruct-head")
METHODS = {
    "Transformers' prompt lookup": "prompt lookup",
    "EAGLE-3's tree of 60 nodes": "EAGLE-3 60/5/10",
    "Re-SpS": "Re-SpS ",
    "the best fixed tree": "best fixed",
    '**`policy="auto"`**': "auto",
}


def measured(head: str) -> list[dict[str, float]]:
    file = ROOT / "model_cards" / head / "results.json"
    rows: list[dict[str, float]] = json.loads(file.read_text())["pooled"]
    return rows


def row_of(head: str, method: str) -> dict[str, float]:
    return next(row for row in measured(head) if str(row["method"]).startswith(method))


@pytest.mark.parametrize("label", METHODS)
def test_a_row_of_results_is_that_of_the_results_files(label: str) -> None:
    line = next(line for line in README.read_text().splitlines() if line.startswith(f"| {label}"))
    numbers = re.findall(r"\d\.\d\d", line)
    rows = [row_of(head, METHODS[label]) for head in HEADS]
    shown = ("ratio", "low", "high") if METHODS[label] == "auto" else ("ratio",)
    assert numbers == [f"{row[name]:.2f}" for row in rows for name in shown]


def test_the_headline_is_the_figure_of_auto() -> None:
    [headline] = re.findall(r"\*\*(\d\.\d)x", README.read_text())
    assert headline == f"{row_of(HEADS[0], 'auto')['ratio']:.1f}"


@pytest.mark.real
def test_the_quickstart_prints_what_stands_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(prepared_target())
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(quickstart().code, "README.md", "exec"), {})
    assert printed.getvalue().strip() == quickstart().output


@pytest.mark.real
def test_the_picture_is_the_one_that_the_model_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))
    pictures = script["draw"](script["best_step"]()), script["PICTURE"].read_text(encoding="utf-8")
    probability = r"(?<=>)\d\.\d\d(?=</text>)"
    drawn, kept = ([float(number) for number in re.findall(probability, picture)] for picture in pictures)
    assert drawn == pytest.approx(kept, abs=0.011)  # processors round differently
    assert re.sub(probability, "", pictures[0]) == re.sub(probability, "", pictures[1])
