"""`training/benchmark.py` from its options to its files, on a tiny target."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarking import command
from tests.tools.conversations import interrupted_at_the_sixth_answer, named, results
from transformers_resps import DraftHead
from transformers_resps.tools.results import BusyMachineError


__all__ = ["named"]  # a fixture
PLOTS = {"ratios.png", "tau.png", "time.png", "costs.png"}
BenchCommand = Callable[..., int]


@pytest.fixture
def bench(named: tuple[str, str, list[str]]) -> BenchCommand:
    """`bench(*options)`: the exit status."""
    target, head, given = named
    return lambda *options: command.main([target, head, *given, *options], "")


def test_it_adds_the_best_fixed_tree_the_oracle_hashes_and_plots(
    bench: BenchCommand, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench("--temperature", "0", "1") == 0
    found = results(tmp_path)
    methods = [row["method"] for row in found["pooled"]]
    assert methods[:4] == ["plain", "prompt lookup", "EAGLE-3 60/5/10", "EAGLE-3 60/7/10"]
    assert methods[4].startswith("best fixed ") and methods[5:] == ["auto", "oracle (ceiling)"]
    assert len(found["measurements"]) == 3 * 2 * 6 and len(found["ceilings"]) == 3 * 2
    assert not found["partial"] and not found["unexplained"]
    for hashes in found["weights_sha256"], found["config_sha256"]:
        assert set(hashes) == {"head"} and all(hashes.values())
    more = {"commit", "dirty", "code_sha256", "target_fingerprint", "peers", "environment"}
    assert more | {"command", "device", "dtype", "versions", "advice", "costs"} <= found.keys()
    assert found["noise"]["accepted"] and found["best_fixed"]["prompts"] and found["settings"]["searched"]
    assert found["steps"]["auto"].keys() >= {"mean_nodes", "verify_seconds"}
    assert PLOTS | {"table.md", "journal.jsonl"} <= {file.name for file in (tmp_path / "out").iterdir()}
    printed = capfd.readouterr()
    assert "| all | 1 | *oracle (ceiling)* |" in printed.out and found["advice"] in printed.out
    assert printed.err == "", "no terminal is there, so nothing but the findings is printed"


def test_after_ctrl_c_the_same_command_goes_on(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupted_at_the_sixth_answer(monkeypatch)
    options = ("--methods", "prompt-lookup")  # three methods, three turns
    assert bench(*options) == 130
    stopped = results(tmp_path)
    assert stopped["partial"] and len(stopped["measurements"]) == 3
    assert bench(*options) == 0
    assert len(calls) == 6 + 4  # five were kept
    whole = results(tmp_path)
    assert not whole["partial"] and len(whole["measurements"]) == 9
    assert whole["measurements"][:3] == stopped["measurements"]
    assert whole["steps"].keys() == {"auto"}
    assert bench(*options) == 0 and len(calls) == 10
    assert bench(*options, "--max-new-tokens", "6") == 2  # other settings


def test_other_weights_are_not_mixed_in(
    bench: BenchCommand, tmp_path: Path, tiny_head: DraftHead, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--methods") == 0
    with torch.no_grad():
        tiny_head.fc.weight[0, 0] += 1
    tiny_head.save_pretrained(tmp_path / "head")
    assert bench("--methods") == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_the_best_fixed_tree_is_not_searched_on_what_is_evaluated(
    bench: BenchCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--methods", "best-fixed", "--search-dataset", str(tmp_path / "mine.jsonl")) == 2
    assert "--search-dataset" in capsys.readouterr().err
    assert bench("--methods", "best-fixed", "--limit", "5") == 2
    assert "Lower --limit" in capsys.readouterr().err


def test_without_other_prompts_the_default_does_without_a_best_fixed_tree(bench: BenchCommand, tmp_path: Path) -> None:
    assert bench("--limit", "5", "--max-new-tokens", "2") == 0
    found = results(tmp_path)
    assert found["best_fixed"] is None and found["settings"]["methods"] == ["prompt-lookup", "eagle", "oracle"]


def test_a_noisy_machine_is_told_with_the_journal_to_delete(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(_: object) -> None:
        raise BusyMachineError("The machine is noisy.")

    monkeypatch.setattr(command, "check_spread", noisy)
    journal = command.Journal(tmp_path, {})
    with pytest.raises(BusyMachineError, match=r"The machine is noisy\. Delete .*journal.jsonl first"):
        command.check_quiet([], journal)


def test_a_method_of_no_benchmark_ends_with_a_usage_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["target", "head", "--dataset", "x.jsonl", "--methods", "magic"], "")
    assert "best-fixed" in capsys.readouterr().err
