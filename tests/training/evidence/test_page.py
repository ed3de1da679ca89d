"""The page answers five questions from its files alone, and says what was not measured."""

import re
from pathlib import Path

import pytest

from training.evidence import experiments as named
from training.evidence.experiments import EXPERIMENTS, QUESTIONS
from training.evidence.page import write_page
from training.evidence.planted import GPUS

from .files import CODE, DRIFTED, ZEN, experiment, rows_of, write, write_all


MAIN = "policy-smollm2-t0"


def page_of(folder: Path, *, quick: bool = False) -> str:
    write_page(folder / "benchmarks.md", folder / "measured", CODE, quick=quick)
    return (folder / "benchmarks.md").read_text()


def row_of(page: str, title: str) -> list[str]:
    [line] = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_files_every_question_stands_there_with_empty_cells_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "measured" / "zen").mkdir(parents=True)
    (tmp_path / "measured" / "zen" / "reasons.json").write_text('{"exact-qwen": "no weights were given"}')
    page = page_of(tmp_path)
    headings = re.findall(r"^## (\d)\. (.*)$", page, re.MULTILINE)
    assert headings == [(str(number), question) for number, question in QUESTIONS.items()]
    assert row_of(page, "exact mode, Qwen")[1:] == ["", "", "", "", "", "no weights were given"]
    assert row_of(page, experiment(MAIN).title)[-1] == "not measured here"
    assert "was not measured." in page and len(page.splitlines()) <= 110
    assert not list(tmp_path.glob("*.svg"))


def test_a_full_page_is_short_and_has_a_picture_for_each_question(tmp_path: Path) -> None:
    for one in EXPERIMENTS:
        for number in range(one.processes):
            rows = rows_of(one.arms, {named.AUTO: 0.5}, number=number)
            write(tmp_path / "measured" / "zen", one.name, number,
                  rows=[row | {"ids": [1, 2]} for row in rows] if one.kind == named.SAMPLES else rows)  # fmt: skip
    page = page_of(tmp_path)
    assert len(page.splitlines()) <= 110 and ZEN in page and f"evidence of code {CODE}" in page
    assert page.count("![") == len(QUESTIONS) == len(list(tmp_path.glob("question-*.svg")))
    assert all("<svg" in file.read_text() for file in tmp_path.glob("*.svg"))
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    seconds = {named.FIXED: 0.5, named.AUTO: 0.25, named.REPAIRED: 1.0}
    write_all(tmp_path / "measured" / "zen", MAIN, seconds)
    cells = row_of(page_of(tmp_path), experiment(MAIN).title)
    assert cells[1] == "4" and cells[2].startswith("2.00 (") and cells[3].startswith("2.00 (")
    assert cells[6].startswith("0.50 (")


def test_the_first_line_says_whether_a_learned_policy_gains(tmp_path: Path) -> None:
    folder = tmp_path / "measured" / "zen"
    write_all(folder, MAIN, {named.FIXED: 0.5})
    assert "**No learned policy gains over the best fixed tree here**: find that tree" in page_of(tmp_path)
    write_all(folder, MAIN, {named.FIXED: 0.5, named.AUTO: 0.4})
    page = page_of(tmp_path)
    assert "**No trained policy gains" in page and f"{named.AUTO} in 1 of 1 settings" in page
    write_all(folder, MAIN, {named.FIXED: 0.5, named.REPAIRED: 0.4})
    assert f"{named.REPAIRED} in 1 of 1 settings, no other. Pass" in page_of(tmp_path)
    few = rows_of(experiment(MAIN).arms, {named.FIXED: 0.5, named.REPAIRED: 0.4}, prompts=2)
    write_all(folder, MAIN, rows=few)
    assert "best fixed tree was not measured." in page_of(tmp_path)


def test_trees_break_even_where_their_steps_still_pay(tmp_path: Path) -> None:
    write_all(
        tmp_path / "measured" / "zen", "budgets-smollm2", {"tree of 4": 0.5, "tree of 8": 0.8, "tree of 16": 1.2}
    )
    page = page_of(tmp_path)
    assert "trees are faster than plain decoding here to 8, at planted costs of an H100 to 64" in page


def test_the_memory_of_a_process_stands_beside_its_speed(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", "engines-smollm2")
    assert row_of(page_of(tmp_path), "SmolLM2, plain")[6] == ""
    write_all(tmp_path / "measured" / "zen", "memory-smollm2")
    assert row_of(page_of(tmp_path), "SmolLM2, plain")[6] == "670"


def test_the_seconds_of_auto_are_told_by_phase(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", "engines-smollm2", {named.AUTO: 2.0})
    assert "SmolLM2: prompt 5%, draft 10%, verification 15%, rest 70%." in page_of(tmp_path)


def test_rows_of_two_processors_stand_apart_and_say_which(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "one", MAIN)
    write_all(tmp_path / "measured" / "two", MAIN, machine={"device": "Intel Xeon, AMX"})
    page = page_of(tmp_path)
    assert row_of(page, f"{experiment(MAIN).title}, A")[1] == row_of(page, f"{experiment(MAIN).title}, B")[1] == "4"
    assert f"Measured on {ZEN}, in bfloat16: A." in page and "Measured on Intel Xeon, AMX, in bfloat16: B." in page


def test_arms_of_one_reason_are_named_together(tmp_path: Path) -> None:
    arms = experiment(MAIN).arms
    left_out = dict.fromkeys(arms[-2:], "none was trained")
    write_all(tmp_path / "measured" / "zen", MAIN, rows=rows_of(arms[:-2], {}), left_out=left_out)
    assert f"Not measured: {', '.join(left_out)}: none was trained." in page_of(tmp_path)


def test_a_run_that_was_not_quiet_gives_no_figure_but_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "measured" / "zen"
    write_all(folder, MAIN)
    write(folder, MAIN, 1, quiet=DRIFTED)
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[1:] == [""] * 7 + ["not quiet: the probes differ by 30%"]
    write(folder, MAIN, 1, {named.PLAIN: 1.3})
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[-1] == "not quiet: its processes lie 30% apart"


def test_fewer_processes_than_the_protocol_asks_for_give_no_figure(tmp_path: Path) -> None:
    write(tmp_path / "measured" / "zen", MAIN, 0)
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[-1] == "1 of 3 processes"


def test_a_quick_page_says_that_it_proves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "measured" / "zen", MAIN, 0, quiet=DRIFTED)
    page = page_of(tmp_path, quick=True)
    assert "**This proves nothing**" in page and row_of(page, experiment(MAIN).title)[1] == "4"


def test_an_arm_below_the_floor_is_said_to_be(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", "hard-drafters", {named.RANDOM_HEAD: 1.1})
    page = page_of(tmp_path)
    rows = [line for line in page.splitlines() if line.startswith("| SmolLM2, drafters that are no use")]
    assert rows[0].endswith("| **no** |") and rows[1].endswith("| yes |")


def test_a_planted_gpu_decodes_as_fast_as_was_published_and_nodes_are_free_until_it_multiplies() -> None:
    h100, a100 = GPUS
    assert 1 / h100.verify_seconds(1, 0) == pytest.approx(158.34)
    assert a100.verify_seconds(1, 0) == pytest.approx(h100.verify_seconds(1, 0) * 3.35 / 2.039)
    assert h100.verify_seconds(256, 0) == h100.verify_seconds(1, 0) < h100.verify_seconds(512, 0)
    assert a100.verify_seconds(153, 0) == a100.verify_seconds(1, 0) < a100.verify_seconds(154, 0)
    assert h100.block_speed(20, {"8/3": 5}) == pytest.approx(4 / (1 + h100.block_seconds * 158.34))
