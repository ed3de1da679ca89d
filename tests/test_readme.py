"""The README's quickstart, figures and picture are what the code and the results files give."""

import io
import json
import re
import runpy
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest

from examples.demo.target import prepared_target
from tests.readme import README, quickstart
from transformers_resps.tools.results import AnswerTiming, compare


ROOT = README.parent
HEADS = ("smollm2-135m-instruct-head", "qwen2.5-coder-0.5b-instruct-head")


def measured(head: str) -> list[dict[str, float]]:
    file = ROOT / "model_cards" / head / "results.json"
    rows: list[dict[str, float]] = json.loads(file.read_text())["pooled"]
    return rows


def row_of(head: str, method: str) -> dict[str, float]:
    return next(row for row in measured(head) if str(row["method"]).startswith(method))


CHART = runpy.run_path(str(ROOT / "docs" / "make_chart.py"))


def test_the_chart_is_drawn_from_the_results_files() -> None:
    kept = CHART["CHART"].read_text(encoding="utf-8")
    assert CHART["draw"]() == kept, "results have changed: run `make docs` and look at the difference"
    figures = re.findall(r">(\d\.\d\d)</text>", kept)
    assert figures == [f"{row_of(head, start)['ratio']:.2f}" for head in HEADS for start in CHART["METHODS"].values()]


def test_what_is_said_of_auto_and_a_fixed_tree_is_what_the_results_files_say() -> None:
    said = re.findall(r"(\d\.\d\d)x[^()]*\((\d\.\d\d) to (\d\.\d\d)\)", README.read_text())
    assert said == [tuple(f"{value:.2f}" for value in over_best_fixed(head)) for head in HEADS]


def over_best_fixed(head: str) -> tuple[float, float, float]:
    """How much faster "auto" is than the best fixed tree, and its 95% interval over prompts."""
    results = json.loads((ROOT / "model_cards" / head / "results.json").read_text())
    names = [field.name for field in fields(AnswerTiming)]
    timings = [AnswerTiming(**{name: one[name] for name in names if name in one}) for one in results["measurements"]]
    fixed = str(row_of(head, "best fixed")["method"])
    found = compare(timings, "auto", fixed)
    return found.ratio, found.low, found.high


def test_the_table_of_speeds_and_the_headline_are_what_the_results_files_say() -> None:
    """Over stock `generate`, but for prepacked weights, which were measured beside prepacked plain decoding alone."""
    measurements = ROOT / "training" / "studies" / "measurements"
    files = [json.loads((measurements / f"smollm2-{name}.json").read_text()) for name in ("zen4-compiled", "compiled")]
    assert [(file["packed"], file["dtype"], len(file["settings"]["prompts"])) for file in files] == [
        (False, "bfloat16", 20)
    ] * 2
    assert [re.findall(r"family (\d+)", file["device"]) for file in files] == [["25"], ["26"]]  # Zen 4, Zen 5
    found = [{row["method"]: f"{row['ratio']:.1f}" for row in file["pooled"]} for file in files]
    eager, compiled, alone = ([one[name] for one in found] for name in ("auto", "auto, compiled", "plain, compiled"))
    page = README.read_text(encoding="utf-8")
    assert f"| as it is | {eager[0]} | {eager[1]} |" in page
    assert f"| `compile` | {compiled[0]} | {compiled[1]} | {alone[0]}, {alone[1]} |" in page
    assert f"`auto` is {row_of(HEADS[0], 'auto')['ratio']:.1f} over prepacked plain, Zen 4" in page
    assert re.findall(r"\*\*(\d\.\d)x", page) == [min(eager)]


@pytest.mark.real
def test_the_quickstart_prints_what_stands_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(prepared_target())
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(quickstart().code, "README.md", "exec"), {})
    text, figures = printed.getvalue().strip().splitlines()
    assert re.sub(r"\d+ forwards", "N forwards", f"{text}\n{figures}") == re.sub(
        r"\d+ forwards", "N forwards", quickstart().output
    ), "how many forwards depends on what the policy measured"


@pytest.mark.real
def test_the_picture_is_the_one_that_the_model_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))
    pictures = script["draw"](script["best_step"]()), script["PICTURE"].read_text(encoding="utf-8")
    probability = r"(?<=>)\d\.\d\d(?=</text>)"
    drawn, kept = ([float(number) for number in re.findall(probability, picture)] for picture in pictures)
    assert drawn == pytest.approx(kept, abs=0.011)  # processors round differently
    assert re.sub(probability, "", pictures[0]) == re.sub(probability, "", pictures[1])
