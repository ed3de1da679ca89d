"""The README's quickstart, figures and picture are what the code and the protocol's results give."""

import io
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from examples.demo.report import README_RATIO
from examples.demo.target import prepared_target
from tests.readme import GAINS, README, ROOT, SPEEDS, found_in, quickstart
from training.evidence.experiments import (
    AUTO,
    FIXED,
    LLAMA_CPP,
    OPENVINO,
    PLAIN,
    STOCK,
    STOCK_COMPILED,
    STOCK_LOOKUP,
    VLLM,
)


ROWS = {  # of the table of speeds -> arm
    "stock, compiled": STOCK_COMPILED,
    "stock's prompt lookup": STOCK_LOOKUP,
    "vLLM with its prompt lookup": VLLM[1],
    "OpenVINO with its prompt lookup": OPENVINO[1],
    "llama.cpp, plain": LLAMA_CPP,
    "compiled, plain": PLAIN,
    "**compiled, `auto`**": AUTO,
}


def test_the_table_of_speeds_and_the_headline_are_what_the_results_files_say() -> None:
    page, found = README.read_text(encoding="utf-8"), found_in(SPEEDS)
    for row, arm in ROWS.items():
        speeds = [one.over(arm, STOCK) for one in (found, found_in(SPEEDS, "Intel"))]
        cells = ["" if speed is None else f"{speed.ratio:.1f}" for speed in speeds]
        assert f"| {row} | {' | '.join(cells)} |".replace("|  |", "| |") in page
    auto = found.over(AUTO, STOCK)
    assert auto is not None and re.findall(r"\*\*(\d\.\d)x", page) == [f"{auto.ratio:.1f}"] == [str(README_RATIO)]
    assert f"{found.prompts} prompts" in page
    for name in GAINS:
        gain = found_in(name).over(AUTO, FIXED)
        assert gain is not None and f"{gain.ratio:.2f} times ({gain.low:.2f} to {gain.high:.2f})" in page


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
