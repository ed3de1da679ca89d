"""`resps bench` from its options to its files, on a tiny target."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.assistants.kinds import add_mtp_layer
from tests.conftest import build_target
from tests.tools.conversations import interrupted_at_the_sixth_answer, named, results
from transformers_resps import DraftHead, FixedPolicy, TreeShape
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.data import write_training_prompts
from transformers_resps.heads import pair_identity
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.tools import bench as command
from transformers_resps.tools.bench import BenchConfig, load_policies, read_options
from transformers_resps.tools.cli import BENCH_METHODS, add_bench_options, main
from transformers_resps.tools.quiet import BusyMachineError, checked_load
from transformers_resps.tools.results import SAME_TEXT_INVARIANT


__all__ = ["named"]  # a fixture
BenchCommand = Callable[..., int]
REAL_COMPILE = torch.compile


@pytest.fixture
def bench(named: tuple[str, str, list[str]]) -> BenchCommand:
    """`bench(*options)`: the exit status."""
    target, head, given = named

    def run(*options: str, head: str | None = head) -> int:
        return main(["bench", *([target] if head is None else [target, head]), *given, *options])

    return run


def parsed(words: str) -> BenchConfig:
    parser = argparse.ArgumentParser()
    add_bench_options(parser, BENCH_METHODS)
    return read_options(parser.parse_args(words.split()), BenchConfig)


def test_options_that_are_left_out_keep_the_defaults_of_the_config() -> None:
    assert parsed("me/target me/head --dataset a") == BenchConfig("me/target", "me/head", ["a"])


def test_every_option_reaches_the_config() -> None:
    words = "t h --dataset a b --policy auto mine --methods --shapes 8,4,2 1,0,1,6 --temperature 0 0.5 --limit 3"
    assert parsed(words) == BenchConfig(
        "t", "h", ["a", "b"], policies=["auto", "mine"], methods=[], temperatures=[0.0, 0.5], limit=3,
        shapes=[TreeShape(8, 4, 2), TreeShape(1, 0, 1, lookup=6)],
    )  # fmt: skip


def test_a_benchmark_writes_everything(
    bench: BenchCommand, tmp_path: Path, tiny_target: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    head = DraftHead.from_pretrained(tmp_path / "head", target=tiny_target)
    identity = pair_identity(tiny_target, head)
    ReSpSPolicy(ReSpSConfig(head.config.features_width, **identity)).save_pretrained(tmp_path / "mine")
    assert bench("--policy", "auto", str(tmp_path / "mine"), "--temperature", "0", "1", "--shapes", "4,2,2") == 0
    found = results(tmp_path)
    methods = [row["method"] for row in found["pooled"]]
    assert methods[:4] == ["plain", "prompt lookup", "EAGLE-3 60/5/10", "EAGLE-3 60/7/10"]
    assert methods[4:] == ["tree 4/2/2", "auto", "Re-SpS mine"]
    assert len(found["measurements"]) == 3 * 2 * 7 and not found["partial"] and not found["unexplained"]
    assert found["same_text"]["Re-SpS mine"] == 6  # sampled or not, seed for seed
    assert found["settings"]["shapes"] == ["tree 4/2/2"] and found["command"][0] == "resps"
    assert {"device", "dtype", "threads", "versions", "advice", "costs", "steps", "head", "policies"} <= found.keys()
    assert found["noise"]["accepted"] and found["steps"]["auto"].keys() >= {"mean_nodes", "verify_seconds"}
    assert {"results.json", "table.md"} <= {file.name for file in (tmp_path / "out").iterdir()}
    printed = capsys.readouterr().out
    assert "| all | 1 | auto |" in printed and found["advice"] in printed


def test_after_ctrl_c_the_prompts_that_all_have_answered_are_written(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at_the_sixth_answer(monkeypatch)
    assert bench("--methods", "prompt-lookup") == 130  # three methods
    stopped = results(tmp_path)
    assert stopped["partial"] and len(stopped["measurements"]) == 3


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


def test_trees_and_policies_are_measured_in_both_modes(
    bench: BenchCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--methods", "--shapes", "4,2,2", "--invariant", "--dtype", "bfloat16") == 0
    found, own = results(tmp_path), ["tree 4/2/2, invariant", "auto, invariant"]
    methods = ["plain", "plain, invariant", "tree 4/2/2", own[0], "auto", own[1]]
    assert [row["method"] for row in found["pooled"]] == methods == list(found["same_text"])
    assert found["same_text_invariant"] == dict.fromkeys(own, 3) and found["settings"]["invariant"]
    told = capsys.readouterr().out
    assert len(re.findall(r"\| all \| .*, invariant .*\| 3 of 3 \|\n", told)) >= 2 and SAME_TEXT_INVARIANT in told


@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_target_is_quantized_for_all_methods(bench: BenchCommand, tmp_path: Path, name: str, library: str) -> None:
    pytest.importorskip(library)
    build_target(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "target")
    assert bench("--methods", "--shapes", "1,0,1,6", "--quantization", name, head=None) == 0
    found = results(tmp_path)
    assert (found["quantization"], found["dtype"]) == (name, "bfloat16") and not found["unexplained"]
    assert len(found["pooled"]) == 3


def test_plain_decoding_is_compiled_by_the_real_compiler(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_function.torch, "compile", REAL_COMPILE)
    target, file = (str(tmp_path / name) for name in ("target", "mine.jsonl"))
    build_target(num_hidden_layers=1).save_pretrained(target)
    quickly: dict[str, Any] = {"limit": 2, "max_new_tokens": 8, "repeats": 1, "output": tmp_path / "out"}
    asked: dict[str, Any] = {"policies": (), "methods": (), "pack": True, "compile": True, "accept_noise": True}
    assert command.bench(BenchConfig(target, None, [file], **asked, **quickly)) == 0
    found = results(tmp_path)
    assert [row["method"] for row in found["pooled"]] == ["plain", "plain, compiled"]
    assert found["not_compiled"] is None and found["packed"]
    assert found["same_text"] == dict.fromkeys(("plain", "plain, compiled"), 3)


def test_nothing_is_compiled_unasked(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled_function.torch, "compile", lambda *_, **__: 1 / 0)
    assert bench("--methods", "--json") == 0
    assert json.loads(capsys.readouterr().out)["advice"] == results(tmp_path)["advice"]
    assert [row["method"] for row in results(tmp_path)["pooled"]] == ["plain", "auto"]


def test_lookup_is_measured_without_a_head(
    bench: BenchCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--shapes", "1,0,1,4", head=None) == 0
    found = results(tmp_path)
    assert [row["method"] for row in found["pooled"]] == ["plain", "prompt lookup", "tree +4", "auto"]
    assert found["head"] is None and not found["unexplained"] and found["training_prompts"] == {}
    FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(tmp_path / "tree")
    for asked in (["--shapes", "8,4,2"], ["--methods", "eagle"], ["--policy", str(tmp_path / "tree")]):
        assert bench(*asked, head=None) == 2
        assert "Name a HEAD after TARGET." in capsys.readouterr().err


@pytest.mark.parametrize("head", ["mtp", "small"])
def test_any_drafter_is_measured(bench: BenchCommand, tmp_path: Path, head: str) -> None:
    add_mtp_layer(tmp_path / "target")
    build_target(num_hidden_layers=1, seed=5).save_pretrained(tmp_path / "small")
    given = head if head == "mtp" else str(tmp_path / head)
    assert bench("--limit", "1", "--methods", "--shapes", "9,2,4", head=given) == 0
    found = results(tmp_path)
    assert [row["method"] for row in found["pooled"]] == ["plain", "tree 9/2/4", "auto"]
    assert found["head"] == given and not found["unexplained"] and found["costs"]["draft"]
    assert found["training_prompts"] == {"head": None}


def test_what_cannot_be_compiled_is_told_in_a_line_and_the_rest_goes_on(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler was found.")

    monkeypatch.setattr(compiled_function.torch, "compile", no_compiler)
    assert bench("--methods", "--compile") == 0
    assert [row["method"] for row in results(tmp_path)["pooled"]] == ["plain", "auto"]
    assert "plain, compiled: not measured. RuntimeError: No working C++ compiler" in capsys.readouterr().out


def test_the_table_is_drawn_when_it_is_asked_for(bench: BenchCommand, tmp_path: Path) -> None:
    drawn = tmp_path / "out" / "ratios.svg"
    assert bench("--methods") == 0 and not drawn.exists()
    assert bench("--methods", "--plot") == 0
    assert drawn.read_text().startswith("<svg") and ">all, auto<" in drawn.read_text()


def test_ctrl_c_while_preparing_is_no_traceback(bench: BenchCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "calibrate", stopped)
    assert bench() == 130


def test_training_prompts_are_not_evaluated(
    bench: BenchCommand, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With others, nothing but the findings is printed where no terminal is."""
    write_training_prompts(tmp_path / "head", ["mnop"])
    assert bench("--methods") == 2
    assert "among the training prompts of head, for example mine/2" in capfd.readouterr().err
    write_training_prompts(tmp_path / "head", ["another"])
    assert bench("--methods") == 0
    assert results(tmp_path)["training_prompts"] == {"head": 1} and capfd.readouterr().err == ""


def test_a_busy_machine_is_refused(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: 1.5)
    monkeypatch.setitem(sys.modules, "transformers_resps.tools.bench", None)  # found before it is loaded
    target, head, file = str(tmp_path / "target"), str(tmp_path / "head"), str(tmp_path / "mine.jsonl")
    assert main(["bench", target, head, "--dataset", file, "--output", str(tmp_path / "busy")]) == 2
    assert "Other processes use 1.5 CPUs" in capsys.readouterr().err and not (tmp_path / "busy").exists()


def test_a_machine_that_becomes_noisy_stops_the_measurement_and_what_is_there_is_partial(
    bench: BenchCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(_: object) -> None:
        raise BusyMachineError("The machine is noisy.")

    monkeypatch.setattr(command, "check_spread", noisy)
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: 0.0)
    target, head, file = str(tmp_path / "target"), str(tmp_path / "head"), str(tmp_path / "mine.jsonl")
    options = ["--methods", "--repeats", "1", "--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    assert main(["bench", target, head, "--dataset", file, *options]) == 2
    assert "The machine is noisy." in capsys.readouterr().err
    found = results(tmp_path)
    assert found["partial"] and {m["prompt"] for m in found["measurements"]} == {"mine/0"}


@pytest.mark.parametrize("load", [None, 0.0, 0.5])
def test_a_quiet_machine_is_accepted(load: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: load)
    assert checked_load(accept_noise=False) == load


def test_a_machine_that_others_use_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: 1.7)
    with pytest.raises(BusyMachineError, match="use 1.7 CPUs, but at most 0.5 .*--accept-noise"):
        checked_load(accept_noise=False)
    assert checked_load(accept_noise=True) == 1.7


@pytest.mark.parametrize("option", [["--shapes", "8,4"], ["--limit", "0"], ["--methods", "magic"]])
def test_a_malformed_option_ends_with_a_usage_message(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "target", "head", "--dataset", "me/x", *option])
    assert option[0] in capsys.readouterr().err


def test_two_policies_never_have_one_name(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = ["old/gsm8k/policy", "new/gsm8k", "chat/policy", "policy-run/policy"]
    for folder in folders:
        FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(folder)
    found = load_policies(["auto", *folders], tiny_target, tiny_head)
    assert list(found) == ["auto", "policy old/gsm8k/policy", "policy new/gsm8k", "policy chat", "policy-run"]
    for same in ("chat/policy", "chat/policy/", "./chat/policy"):
        with pytest.raises(ValueError, match="twice. Pass each policy once"):
            load_policies(["chat/policy", same], tiny_target, tiny_head)


def test_the_benchmark_says_where_its_trees_go(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    with pytest.raises(ValueError, match="`--policy 8,4,2` is a tree.* Pass `--shapes 8,4,2`"):
        load_policies(["8,4,2"], tiny_target, tiny_head)
