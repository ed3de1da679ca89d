"""The study of equal texts, from its options to its file, on a tiny target."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.tools.conversations import save_models, save_rows
from training.studies import invariant_texts
from training.studies.invariant_texts import arms_of, main, wilson
from transformers_resps import DraftHead


@pytest.fixture
def command(tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead) -> list[str]:
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defgdefg", "never asked"], ["klkl"], ["m"], ["qrst"], ["uv"]])
    options = ["--dataset", file, "--dtype", "bfloat16", "--tokens", "4", "--output", str(tmp_path / "texts.json")]
    return [target, head, *options]


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "texts.json").read_text())
    return found


def test_batches_are_answered_in_turn_and_some_prompts_alone_and_the_table_counts_equal_texts(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_head: DraftHead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(invariant_texts, "ROWS", 2)
    tiny_head.save_pretrained(tmp_path / "other")
    assert main([*command, "--prompts", "5", "--every", "2", "--also", str(tmp_path / "other")]) == 0
    found = found_in(tmp_path)
    arms = arms_of({"head": tiny_head, "other": tiny_head})
    alone = [arm for arm in arms if arm.turn is None]
    assert sorted(map(len, found["hashes"].values())) == [2, 2, 2, 2 + len(alone), 2 + len(alone)]
    promised = {row["mode and arm"]: row for row in found["rows"] if row["compared with"].startswith("invariant")}
    assert all(row["texts equal"] == row["of"] for row in promised.values())
    counts = [promised[arm.key]["of"] if arm.key in promised else 0 for arm in arms if arm.is_promised]
    assert sorted(counts) == [0] * 4 + [1] + [2] * 15, "seven ways by turns, of which three came, and all alone"
    assert "| normal, greedy: auto | normal, greedy: stock |" in capsys.readouterr().out
    assert found["facts"]["dtype"] == "bfloat16" and {"threads", "versions", "device"} <= found["facts"].keys()


def test_a_command_that_was_cut_off_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = invariant_texts.write, []

    def counted(target: Any, prompts: Any, arm: Any, *settings: Any) -> list[list[int]]:
        calls.append(([prompt.tolist() for prompt in prompts], arm.key))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return write(target, prompts, arm, *settings)

    monkeypatch.setattr(invariant_texts, "write", counted)
    assert main([*command, "--prompts", "2"]) == 130
    assert sum(map(len, found_in(tmp_path)["hashes"].values())) == 21, "each text is written as it ends"
    assert main([*command, "--prompts", "2"]) == 0
    keys = [key for _, key in calls]
    assert len(keys) == len(set(keys)) + 1 > 20, "what was written is not written again"
    made = len(calls)
    assert main([*command, "--prompts", "2"]) == 0 and len(calls) == made
    with pytest.raises(SystemExit):
        main([*command, "--prompts", "2", "--tokens", "6"])
    assert "was written with another tokens. Pass another --output." in capsys.readouterr().err


def test_a_prompt_with_two_texts_is_named_with_the_arm_and_the_token(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = invariant_texts.write

    def wrong(target: Any, prompts: Any, arm: Any, *settings: Any) -> list[list[int]]:
        texts = write(target, prompts, arm, *settings)
        if arm.key == "invariant, greedy: auto":
            texts[0][3] += 1
        return texts

    monkeypatch.setattr(invariant_texts, "write", wrong)
    assert main([*command, "--prompts", "1"]) == 1
    assert "TWO TEXTS: mine/" in (said := capsys.readouterr().out)
    assert "invariant, greedy: auto: parts at token 3" in said
    rows = {row["mode and arm"]: row for row in found_in(tmp_path)["rows"]}
    assert rows["invariant, greedy: auto"]["texts equal"] == 0 and rows["invariant, greedy: lookup"]["of"] == 1


@pytest.mark.parametrize(
    ("equal", "total", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (535, 1190, 0.4216, 0.4780)],
)
def test_the_interval_is_wilsons(equal: int, total: int, low: float, high: float) -> None:
    assert wilson(equal, total) == pytest.approx((low, high), abs=2e-4)


def test_first_turns_are_joined_for_long_prompts(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--join", "2"]) == 0
    names = found_in(tmp_path)["hashes"]
    assert sorted(name for joined in names for name in joined.split("+")) == sorted(set("+".join(names).split("+")))
    assert len(names) == 2 and all(name.count("+") == 1 for name in names), "of five turns one is left over"
