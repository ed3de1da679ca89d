"""The page answers five questions from its files alone, and says what was not measured."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.evidence import experiments as named
from training.evidence.experiments import EXPERIMENTS, QUESTIONS, experiments
from training.evidence.page import share_interval, variation
from training.evidence.planted import GPUS

from .files import CODE, DISTURBED, DRIFTED, ZEN, experiment, machine, page_of, rows_of, write, write_all


MAIN = "policy-smollm2-t0"
PROTOCOL = Path("training/PROTOCOL.md")


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
    assert "was not measured." in page and len(page.splitlines()) <= 140
    assert not list(tmp_path.glob("*.svg"))


def test_a_full_page_is_short_and_has_a_picture_for_each_question(tmp_path: Path) -> None:
    for one in EXPERIMENTS:
        for number in range(one.processes):
            rows = rows_of(one.arms, {named.AUTO: 0.5}, number=number)
            write(tmp_path / "measured" / "zen", one.name, number,
                  rows=[row | {"ids": [1, 2]} for row in rows] * 2 if one.kind == named.SAMPLES else rows)  # fmt: skip
    page = page_of(tmp_path)
    assert len(page.splitlines()) <= 140 and page.count(f"version `0.1.0 (code {CODE[:12]})` on {ZEN}") == 5
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
    write_all(tmp_path / "measured" / "zen", "quantized-smollm2", {"int8, plain": 0.5})
    page = page_of(tmp_path)
    assert row_of(page, "SmolLM2, plain")[6] == row_of(page, "SmolLM2 in few bits, int8, plain")[6] == "670"
    assert row_of(page, "SmolLM2 in few bits, int8, plain")[1:3] == ["", "2.00 (2.00 to 2.00)"]


def test_the_seconds_of_auto_are_told_by_phase(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", "engines-smollm2", {named.AUTO: 2.0})
    assert "SmolLM2: prompt 5%, draft 10%, verification 15%, rest 70%." in page_of(tmp_path)


@pytest.mark.parametrize(
    ("newer", "says"),
    [
        ({"machine": machine("Intel Xeon, AMX")}, f"version `0.1.0 (code {CODE[:12]})` on Intel Xeon, AMX"),
        ({"code": {"code_sha256": "beef" * 16}}, f"version `0.1.0 (code beefbeefbeef)` on {ZEN}"),
    ],
    ids=["processors", "versions"],
)
def test_two_versions_or_processors_have_tables_of_their_own_the_newest_first(
    tmp_path: Path, newer: dict[str, Any], says: str
) -> None:
    write_all(tmp_path / "measured" / "old", MAIN, {named.AUTO: 0.5})
    write_all(tmp_path / "measured" / "new", MAIN, {named.AUTO: 0.25}, date="2026-12-02", **newer)
    page = page_of(tmp_path)
    tables = page[page.index("## 2.") : page.index("## 3.")].split("Measured: ")[1:]
    assert [table.split(", in")[0] for table in tables] == [says, f"version `0.1.0 (code {CODE[:12]})` on {ZEN}"]
    assert [row_of(table, experiment(MAIN).title)[3][:4] for table in tables] == ["4.00", "2.00"]
    assert page.count("question-2.svg") == 1 and page.count("not measured here") == len(EXPERIMENTS) - 1 - 2


def test_arms_of_one_reason_are_named_together(tmp_path: Path) -> None:
    arms = experiment(MAIN).arms
    left_out = dict.fromkeys(arms[-2:], "none was trained")
    write_all(tmp_path / "measured" / "zen", MAIN, rows=rows_of(arms[:-2], {}), left_out=left_out)
    assert f"Not measured: {', '.join(left_out)}: none was trained." in page_of(tmp_path)


def test_a_process_that_was_disturbed_or_lies_apart_gives_no_figure_but_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "measured" / "zen"
    write_all(folder, MAIN)
    write(folder, MAIN, 1, quiet=DISTURBED)
    reason = "not quiet: others used 0.30 processors during it"
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[1:] == [""] * 7 + [reason]
    write(folder, MAIN, 1, {named.PLAIN: 1.3})
    assert "not quiet: its ratios lie" in row_of(page_of(tmp_path), experiment(MAIN).title)[-1]
    write(folder, MAIN, 2)
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[3].startswith("1.00 (")  # the others stand


def test_a_probe_that_drifts_takes_absolute_times_alone(tmp_path: Path) -> None:
    write_all(tmp_path / "measured" / "zen", "engines-smollm2")
    assert row_of(page_of(tmp_path), "SmolLM2, plain")[5] == "100"
    write(tmp_path / "measured" / "zen", "engines-smollm2", 1, quiet=DRIFTED)
    cells = row_of(page_of(tmp_path), "SmolLM2, plain")
    assert cells[1].startswith("1.00 (") and cells[5] == ""


def test_fewer_processes_than_the_protocol_asks_for_give_no_figure(tmp_path: Path) -> None:
    write(tmp_path / "measured" / "zen", MAIN, 0)
    assert row_of(page_of(tmp_path), experiment(MAIN).title)[-1] == "1 of 2 processes"


def test_a_protocol_of_a_version_takes_four_and_a_half_hours_at_most_and_a_drift_check_ten_minutes() -> None:
    page = PROTOCOL.read_text(encoding="utf-8")
    assert sum(one.minutes for one in EXPERIMENTS) <= 270 and sum(one.minutes for one in experiments("drift")) <= 10
    for number in QUESTIONS:
        minutes = sum(one.minutes for one in EXPERIMENTS if one.question == number)
        assert re.search(rf"^\| {number}\..*\| {minutes:.0f} \|$", page, re.MULTILINE), f"{number}: {minutes:.0f}"


def test_a_share_has_the_wilson_interval_of_the_formula() -> None:
    low, high = share_interval(1000, 1000)
    assert low == pytest.approx(1000 / (1000 + 1.959964**2)) and high == 1.0
    assert share_interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_a_permutation_finds_other_distributions_and_no_difference_in_equal_ones() -> None:
    drawn = np.random.default_rng(1)
    own, same = drawn.integers(0, 4, (2, 60, 3))
    distance, chance = variation(own, same, draws=199)
    assert 0 < distance < 0.3 and chance > 0.05
    distance, chance = variation(own, drawn.integers(2, 6, (60, 3)), draws=199)
    assert distance > 0.3 and chance < 0.01


def test_a_quick_page_says_that_it_proves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "measured" / "zen", MAIN, 0, quiet=DISTURBED)
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
