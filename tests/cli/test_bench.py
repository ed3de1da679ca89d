"""`resps bench` from its options to its files, on a tiny target."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.bench.conversations import save_models, save_rows
from transformers_resps import DraftHead
from transformers_resps.bench import __main__ as command
from transformers_resps.bench.runs import Bench
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.data import write_training_prompts
from transformers_resps.heads import pair_identity
from transformers_resps.policies import ReSpSConfig, ReSpSPolicy


ROWS = [["defg", "hi"], ["klkl"], ["mnop"], ["qrst"], ["uvwx"]]
PLOTS = {"ratios.png", "tau.png", "sizes.png", "time.png", "costs.png"}
BenchCommand = Callable[..., int]
REAL_COMPILE = torch.compile


@pytest.fixture
def bench(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> BenchCommand:
    """`bench(*options)`: the exit status, with a dataset of five rows of which two are evaluated.

    What is compiled runs as it is: real compilation takes half a minute.
    """
    monkeypatch.setattr(compiled_function.torch, "compile", lambda function, **_: function)
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", ROWS)

    def run(*options: str) -> int:
        output = ["--output", str(tmp_path / "out"), "--accept-noise", "--limit", "2", "--max-new-tokens", "8"]
        return command.main([target, head, "--dataset", file, "--repeats", "1", *output, *options])

    return run


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def test_a_benchmark_writes_everything(
    bench: BenchCommand, tmp_path: Path, tiny_target: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    head = DraftHead.from_pretrained(tmp_path / "head", target=tiny_target)
    identity = pair_identity(tiny_target, head)
    ReSpSPolicy(ReSpSConfig(head.config.features_width, **identity)).save_pretrained(tmp_path / "mine")
    assert bench("--policy", "auto", str(tmp_path / "mine"), "--temperature", "0", "1") == 0
    found = results(tmp_path)
    methods = [row["method"] for row in found["pooled"]]
    assert methods[:5] == ["plain", "plain, compiled", "prompt lookup", "EAGLE-3 60/5/10", "EAGLE-3 60/7/10"]
    assert methods[5].startswith("best fixed ") and methods[6:] == ["auto", "Re-SpS mine", "oracle (ceiling)"]
    assert len(found["measurements"]) == 3 * 2 * 8 and not found["partial"] and not found["unexplained"]
    assert found["same_text"]["Re-SpS mine"] == 6  # sampled or not, seed for seed
    for hashes in found["weights_sha256"], found["config_sha256"]:
        assert set(hashes) == {"head", "Re-SpS mine"} and all(hashes.values())
    assert {"command", "commit", "dirty", "device", "dtype", "threads", "versions", "advice", "costs"} <= found.keys()
    assert found["noise"]["accepted"] and found["best_fixed"]["prompts"]
    assert PLOTS | {"table.md", "journal.jsonl"} <= {file.name for file in (tmp_path / "out").iterdir()}
    printed = capsys.readouterr().out
    assert "| all | 1 | auto |" in printed and found["advice"] in printed


def test_after_ctrl_c_the_same_command_goes_on(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = Bench.decode, []

    def counted(self: Bench, *args: Any, **kwargs: Any) -> Any:
        if "max_new_tokens" not in kwargs:  # no warm-up
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(Bench, "decode", counted)
    options = ("--methods", "prompt-lookup")  # four methods, three turns
    assert bench(*options) == 130
    stopped = results(tmp_path)
    assert stopped["partial"] and len(stopped["measurements"]) == 4
    assert bench(*options) == 0
    assert len(calls) == 6 + 7  # five were kept
    whole = results(tmp_path)
    assert not whole["partial"] and len(whole["measurements"]) == 12
    assert whole["measurements"][:4] == stopped["measurements"]
    assert bench(*options) == 0 and len(calls) == 13
    assert bench(*options, "--max-new-tokens", "6") == 2  # other settings


def test_trees_and_policies_are_measured_both_ways(
    bench: BenchCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--methods", "--shapes", "4,2,2", "--compile") == 0
    found = results(tmp_path)
    rows = {row["method"]: row for row in found["pooled"]}
    assert list(rows) == ["plain", "plain, compiled", "tree 4/2/2", "tree 4/2/2, compiled", "auto", "auto, compiled"]
    assert found["not_compiled"] is None and found["settings"]["compile"]
    assert all(
        row["compiled_efficiency"] == pytest.approx(row["compiled_ratio"] / row["tau"]) for row in rows.values()
    )
    assert found["same_text"] == dict.fromkeys(rows, 3) and "| ratio to compiled plain |" in capsys.readouterr().out


def test_plain_decoding_is_compiled_by_the_real_compiler(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_function.torch, "compile", REAL_COMPILE)
    assert bench("--methods", "--pack") == 0
    found = results(tmp_path)
    assert [row["method"] for row in found["pooled"]] == ["plain", "plain, compiled", "auto"]
    assert found["not_compiled"] is None and found["same_text"] == dict.fromkeys(
        ("plain", "plain, compiled", "auto"), 3
    )


def test_what_cannot_be_compiled_is_told_in_a_line_and_the_rest_goes_on(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler was found.")

    monkeypatch.setattr(compiled_function.torch, "compile", no_compiler)
    assert bench("--methods", "--compile") == 0
    assert [row["method"] for row in results(tmp_path)["pooled"]] == ["plain", "auto"]
    assert "plain, compiled: not measured. RuntimeError: No working C++ compiler" in capsys.readouterr().out


def test_ctrl_c_while_preparing_is_no_traceback(bench: BenchCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_resps.bench.session.calibrate", stopped)
    assert bench() == 130


def test_other_weights_are_not_mixed_in(
    bench: BenchCommand, tmp_path: Path, tiny_head: DraftHead, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--methods") == 0
    with torch.no_grad():
        tiny_head.fc.weight[0, 0] += 1
    tiny_head.save_pretrained(tmp_path / "head")
    assert bench("--methods") == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_training_prompts_are_not_evaluated(
    bench: BenchCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_training_prompts(tmp_path / "head", ["mnop"])
    assert bench("--methods") == 2
    assert "among the training prompts of head, for example mine/2" in capsys.readouterr().err
    write_training_prompts(tmp_path / "head", ["another"])
    assert bench("--methods") == 0
    assert results(tmp_path)["training_prompts"] == {"head": 1}


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


def test_a_busy_machine_is_refused(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "other_load", lambda: 1.5)
    target, head, file = str(tmp_path / "target"), str(tmp_path / "head"), str(tmp_path / "mine.jsonl")
    assert command.main([target, head, "--dataset", file, "--output", str(tmp_path / "busy")]) == 2
    assert "Other processes use 1.5 CPUs" in capsys.readouterr().err and not (tmp_path / "busy").exists()


def test_without_a_terminal_nothing_but_the_findings_is_printed(
    bench: BenchCommand, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_training_prompts(tmp_path / "head", [])
    assert bench("--methods") == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("option", [["--shapes", "8,4"], ["--limit", "0"], ["--methods", "magic"]])
def test_a_malformed_option_ends_with_a_usage_message(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["target", "head", "--dataset", "x.jsonl", *option])
    assert option[0] in capsys.readouterr().err
