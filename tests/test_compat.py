"""What a command needs beside the base install is named in one line; and a target is loaded as what it is."""

import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from benchmarking.command import main as benchmark
from examples.demo import __main__ as demo
from tests.image_processors import image_target
from tests.processors import StandIn
from tests.targets import Architecture
from training.studies import engine_speed
from transformers_resps import compat
from transformers_resps.compat import check_extra


ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "examples" / "demo" / "prompts.jsonl"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that seem to be installed; everything else is missing."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise compat.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(compat, "version", version)
    return found


@pytest.mark.parametrize("extra", ["demo", "bench", "inspect", "train"])
def test_everything_that_an_extra_lists_is_asked_for(extra: str, installed: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"pip install 'transformers-resps\[{extra}\]'") as error:
        check_extra(extra)
    for needed in EXTRAS[extra]:
        assert Requirement(needed).name in str(error.value)


def test_it_is_content_once_all_are_there(installed: dict[str, str]) -> None:
    installed |= {"gguf": "0.17", "rich": "15.1", "accelerate": "1.15.0"}
    check_extra("demo")


def test_a_release_that_is_too_old_is_named_with_the_one_that_is_needed(installed: dict[str, str]) -> None:
    installed |= {"gguf": "0.16", "rich": "15.1", "accelerate": "1.15.0"}
    with pytest.raises(ValueError, match=r"needs gguf>=0.17\. Run"):
        check_extra("demo")


def test_extras_of_an_extra_count(installed: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"matplotlib.*openvino-genai"):
        check_extra("peers")


@pytest.mark.parametrize(
    ("main", "words", "extra"),
    [(lambda words: benchmark(words, ""), f"target head --dataset {PROMPTS}", "bench"), (demo.main, "", "demo")],
    ids=["benchmark", "demo"],
)
def test_a_command_stops_with_one_line(
    main: Any, words: str, extra: str, installed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    *earlier, said = capsys.readouterr().err.strip().split("\n")
    assert f"'transformers-resps[{extra}]'" in said and not [line for line in earlier if "loading" not in line]


def test_a_study_stops_with_one_line(installed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        engine_speed.main([])
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "'transformers-resps[bench]'" in said


@pytest.mark.parametrize("script", ["train_head", "train_policy"])
def test_a_training_script_stops_with_one_line(
    script: str, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "training" / f"{script}.py"), run_name="__main__")
    assert "'transformers-resps[train]'" in str(ended.value.code) and "\n" not in str(ended.value.code)


@pytest.mark.parametrize(("model_type", "sees"), [("llama", False), ("gemma3", True), ("qwen3_vl", True)])
def test_a_model_is_loaded_with_its_tower(model_type: str, sees: bool, tmp_path: Path) -> None:
    """`AutoModelForCausalLM` has no class for Qwen3-VL."""
    if sees:
        image_target(model_type).save_pretrained(tmp_path)
    else:
        Architecture(model_type).build("sdpa").save_pretrained(tmp_path)
    target = compat.load_model(str(tmp_path), dtype="float32", local_files_only=True)
    assert ("image" in target.input_modalities) == sees


# By the names of torch and of /proc/cpuinfo, weakest first; each instruction set is what those up to it have.
FLAGS = {
    "SSE41": {"sse4_1", "popcnt"},
    "AVX": {"avx"},
    "AVX2": {"avx2", "fma3"},
    "AVX512_CORE": {"avx512_f", "avx512f", "avx512_bw", "avx512bw"},
    "AVX512_CORE_VNNI": {"avx512_vnni"},
    "AVX512_CORE_BF16": {"avx512_bf16"},
    "AVX512_CORE_AMX": {"amx_tile", "amx_bf16", "avx512_fp16", "avx_vnni"},
}


@pytest.mark.parametrize("isa", FLAGS)
def test_a_machine_stands_in_for_one_with_fewer_instructions(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = set[str]().union(*FLAGS.values())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)
    monkeypatch.delenv(compat.FLAGS_VARIABLE, raising=False)
    assert compat.cpu_flags() == flags
    monkeypatch.setenv(compat.FLAGS_VARIABLE, StandIn(isa).environment[compat.FLAGS_VARIABLE])
    names = [*FLAGS]
    assert compat.cpu_flags() == set[str]().union(*(FLAGS[name] for name in names[: names.index(isa) + 1]))
