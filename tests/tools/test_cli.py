"""`resps` as a user types it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import build_target
from tests.targets import VOCABULARY
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, prepack
from transformers_resps.compilation.packages import sealed
from transformers_resps.tools import cli
from transformers_resps.tools.bench import BenchConfig
from transformers_resps.tools.cli import main
from transformers_resps.verifying.growing import TreeVerifier
from transformers_resps.verifying.prepacking import is_prepacked


@pytest.mark.parametrize("command", ["doctor", "inspect", "calibrate", "verify", "bench", "serve", "compile", "cache"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"resps {command}" in capsys.readouterr().out


def test_the_cache_shows_compiled_code_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESPS_COMPILED_CODE", str(tmp_path))
    for name, manifest in (("one", {"identity": {"model": "Llama small", "code": "steps"}}), ("other", {})):
        (tmp_path / "of-a-model" / name).mkdir(parents=True)
        (tmp_path / "of-a-model" / name / "package.json").write_text(json.dumps(sealed(manifest) if manifest else {}))
        (tmp_path / "of-a-model" / name / "code.pt2").write_bytes(bytes(1_500_000))
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "1.5 MB" in shown and "Llama small: steps" in shown and "damaged" in shown and "3.0 MB" in shown
    assert cli.main(["cache", "--clear"]) == 0 and not list(tmp_path.iterdir())
    assert "Removed 3.0 MB" in capsys.readouterr().out
    monkeypatch.setenv("RESPS_COMPILED_CODE", "0")
    assert cli.main(["cache"]) == 0 and "RESPS_COMPILED_CODE is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said", "typed"),
    [
        (
            "verify target --invariant",
            "`invariant=True` does not support autocast. Leave its block, or pass `invariant=False`.",
            "`--invariant` does not support autocast. Leave its block, or leave out `--invariant`.",
        ),
        (
            "bench target --dataset x --invariant --compile",
            "`compile=True` with `invariant=True` cannot run: no. Leave out `compile`.",
            "`--compile` with `--invariant` cannot run: no. Leave out `--compile`.",
        ),
        (
            "verify target --invariant",
            "It rounds. Load the model in float32, or pass `invariant=False`.",
            "It rounds. Pass `--dtype float32`, or leave out `--invariant`.",
        ),
        ("cache", "Pass `invariant=False`.", "Pass `invariant=False`."),
    ],
)
def test_a_refusal_of_the_library_is_said_in_flags(command: str, said: str, typed: str) -> None:
    assert cli.in_flags(said, cli.make_parser().parse_args(command.split())) == typed


def test_a_command_returns_the_status_of_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchConfig] = []
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: 0.0)
    monkeypatch.setattr("transformers_resps.tools.bench.bench", lambda config, *_, **__: seen.append(config) or 1)
    assert cli.main(["bench", "target", "head", "--dataset", "me/x"]) == 1
    assert cli.main(["bench", "target", "--dataset", "me/x"]) == 1
    assert seen == [BenchConfig("target", "head", ["me/x"]), BenchConfig("target", None, ["me/x"])]


@pytest.mark.parametrize(
    "words",
    [
        "doctor target head --answers 0",
        "doctor target head --max-length -3",
        "verify target --prompts 0",
        "verify target --seeds 0",
        "inspect target --prompt x --output x.html --max-new-tokens 0",
        "doctor target head --dtype float17",
        "serve target --dtype float17",
        "serve target --quantization int2",
        "bench target --dataset me/x --quantization fp8",
        "bench target --dataset missing.jsonl",
        "verify target --dataset missing.json",
        "serve ./not/there",
        "verify target --device gpu",
        "verify target --device meta",
        "calibrate target --dtype float8_e4m3fn",
        "bench target head --dataset me/x --dtype float17",
        "bench target head --dataset me/x --temperature 0 nan",
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
    told = capsys.readouterr().err
    assert " is no " in told or "invalid choice: 'float" in told


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--help", 0, "doctor"),
        ("--version", 0, f"transformers-resps {version('transformers-resps')}"),
        ("bench --help", 0, "--dataset"),
        ("frob", 2, "invalid choice: 'frob'"),
        ("doctor target", 2, "required: head"),
        ("verify target --prompts 0 --device cpu", 2, "'0' is no integer above 0"),
    ],
)
def test_what_needs_no_model_loads_no_library(words: str, status: int, said: str) -> None:
    """Neither PyTorch nor Transformers, which take seconds, nor an extra."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'rich', 'gguf', 'trl', 'datasets']))"
    )
    code += f"; from resps import main; main({words.split()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr and "loading PyTorch" not in done.stderr


QUICK = ["--seeds", "1", "--prompts", "1", "--max-new-tokens", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A target with its tokenizer, and a head."""
    folder: Path = tmp_path_factory.mktemp("verify")
    target = build_target(vocab_size=VOCABULARY, initializer_range=0.6, num_hidden_layers=2)
    target.save_pretrained(folder / "target")
    letter_tokenizer().save_pretrained(folder / "target")
    torch.manual_seed(1)
    DraftHead.from_target(target).save_pretrained(folder / "head")
    return str(folder / "target"), str(folder / "head")


def test_a_lossless_head_is_told_so_with_status_0(folders: tuple[str, str], capsys: Any, tmp_path: Path) -> None:
    FixedPolicy(TreeShape(10, 2, 9)).save_pretrained(tmp_path)
    assert main(["verify", *folders, str(tmp_path), *QUICK]) == 0
    page = capsys.readouterr().out
    assert "LOSSLESS: every answer is the plain one" in page and "FixedPolicy" in page
    assert "torch.float32" in page and folders[1] in page
    assert main(["verify", *folders, str(tmp_path), *QUICK, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["is_lossless"] and told["verdict"].startswith("LOSSLESS") and told["facts"]["head"].startswith(folders[1])
    )


def test_the_invariant_mode_is_examined_in_half_precision(folders: tuple[str, str], capsys: Any) -> None:
    invariant = ["--invariant", "--dtype", "bfloat16", "--pack", *QUICK]
    assert main(["verify", *folders, "10,2,9", *invariant, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    has_units = is_prepacked(prepack(torch.nn.Linear(64, 64, dtype=torch.bfloat16)))  # others multiply as before
    assert (told["facts"]["mode"], told["facts"]["packed"]) == ("invariant", str(has_units))
    assert told["verdict"].startswith("LOSSLESS: every answer is the plain one of the invariant mode")


def test_a_lossy_engine_is_told_so_with_status_1(
    folders: tuple[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_second_best(method: str) -> None:
        stock = getattr(TreeVerifier, method)

        def lossy(*given: Any, **options: Any) -> tuple[torch.Tensor, Any]:
            logits, features = stock(*given, **options)
            return logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf), features

        monkeypatch.setattr(TreeVerifier, method, lossy)

    with_second_best("prefill")
    with_second_best("verify")
    assert main(["verify", *folders, "10,2,9", *QUICK]) == 1
    page = capsys.readouterr().out
    assert "NOT LOSSLESS: greedy" in page and "position 0: plain wrote" in page
    assert main(["verify", *folders, "10,2,9", *QUICK, "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["is_lossless"]


def test_a_quick_check_is_smaller_and_a_stopped_one_reports(
    folders: tuple[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", *folders, "10,2,9", "--device", "cpu", "--quick"]) == 0
    assert "greedy: 2 of 2 answers equal" in capsys.readouterr().out
    monkeypatch.setattr("transformers_resps.testing.lossless.check_distribution", _stop)
    assert main(["verify", *folders, "10,2,9", "--device", "cpu", "--quick"]) == 130
    assert "stopped after 9 comparisons, before the distribution test" in capsys.readouterr().out


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_head_in_place_of_the_target_is_recognised(folders: tuple[str, str], capsys: Any) -> None:
    target, head = folders
    for words in (["verify", head, target], ["doctor", head, target], ["calibrate", head]):
        assert main(words) == 2
        assert f"The target is {head!r}, which is a draft head" in capsys.readouterr().err


def test_what_cannot_be_examined_has_status_2(folders: tuple[str, str], capsys: Any, tmp_path: Path) -> None:
    assert main(["verify", *folders, str(tmp_path / "nowhere"), *QUICK]) == 2
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    assert main(["verify", *folders, *QUICK, "--dataset", str(tmp_path / "empty.jsonl")]) == 2
    assert "has no user turns" in capsys.readouterr().err


def test_a_check_in_which_no_draft_was_accepted_has_status_2(folders: tuple[str, str], capsys: Any) -> None:
    assert main(["verify", *folders, "1,0,1", *QUICK]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOTHING WAS TESTED: no drafted token of the policy")
