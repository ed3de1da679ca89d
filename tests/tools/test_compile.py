"""`resps compile`, as a call with `compile="auto"` runs it in another process."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import build_target
from tests.drafting.test_block_drafter import block_head
from tests.kernels import needs_compiler
from tests.targets import VOCABULARY
from tests.tokenizers import templated
from transformers_resps import attach
from transformers_resps.compilation import beside, packages
from transformers_resps.compilation.beside import CompilerProcess
from transformers_resps.compilation.kernels import reads_few_bits
from transformers_resps.compilation.packages import FOLDER_VARIABLE, stored_packages
from transformers_resps.tools import cli
from transformers_resps.tools.loading import load_target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    build_target(vocab_size=VOCABULARY, num_hidden_layers=1, eos_token_id=None).save_pretrained(folder)
    templated().save_pretrained(folder)
    return folder


def written(target: PreTrainedModel, **options: Any) -> list[int]:
    text, options = torch.tensor([[3, 4, 5, 3, 4]]), {"policy": "auto", "compile": "auto"} | options
    tokens: list[int] = target.generate(text, max_new_tokens=12, do_sample=False, **options)[0].tolist()
    return tokens


@needs_compiler
def test_a_call_with_auto_waits_for_nobody_and_a_later_one_takes_up_the_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's steps and a block head's drafts."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    target = attach(AutoModelForCausalLM.from_pretrained(checkpoint))
    sizes = {"feature_layers": [0], "draft_vocab_size": 11, "owns_output_head": True, "confidence": True}
    block_head(target, **sizes).save_pretrained(tmp_path / "head")
    monkeypatch.setattr(
        beside, "_RUN", beside._RUN.replace(f"os.nice({beside._NICENESS}); ", "")
    )  # other tests are busy
    state, drafts = target.speculation_state, {"assistant_model": str(tmp_path / "head")}
    before = written(target, **drafts)
    assert state.compiler.is_running and not state.slot_engine.is_compiled
    process = state.compiler._process
    assert process is not None
    process.wait()
    assert not state.compiler.is_running, "it has not failed"
    codes = [package.code for package in stored_packages(tmp_path / "compiled")]
    assert any(code.startswith("drafts the text and a block of ") for code in codes), (
        "names of our classes say nothing"
    )
    assert "steps, one row" in codes and sorted(code.split()[0] for code in codes) == ["drafts", "steps,"]
    assert written(target, **drafts) == before == written(target, policy="plain", compile=False)
    assert state.slot_engine.is_compiled and not state.draft_engines.lack_code and not state.compiler.is_running
    assert len(stored_packages(tmp_path / "compiled")) == 2, "nothing else was compiled"


class Compiling(BaseException):
    """Raised in the place of compiling."""


@needs_compiler
@pytest.mark.skipif(not reads_few_bits(), reason="asks for AVX512-BF16 and AVX512-VBMI")
@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_target_that_was_quantized_while_loading_is_the_same_model_there(
    name: str, library: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So tests/compilation/test_few_bits.py shows that a later model takes up its code."""
    pytest.importorskip(library)

    def refuse(*_: Any) -> None:
        raise Compiling

    commands: list[Sequence[str]] = []
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    monkeypatch.setattr(CompilerProcess, "_start", lambda *given: commands.append(given[-1]))
    monkeypatch.setattr(packages, "_compile", refuse)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "eos_token_id": None}
    build_target(vocab_size=VOCABULARY, **sizes).save_pretrained(checkpoint)
    written(attach(load_target(str(checkpoint), None, "cpu", quantization=name)))
    (command,) = commands
    with pytest.raises(Compiling):  # another model would be refused before
        cli.main([*command])


def test_another_model_than_the_checkpoint_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # nothing is compiled
    monkeypatch.setenv(FOLDER_VARIABLE, str(checkpoint))
    assert cli.main(["compile", str(checkpoint), "--only-as", "another"]) == 2
    assert "The model differs from its checkpoint. Pass `compile=True`" in capsys.readouterr().err


def test_where_no_code_is_kept_nothing_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, "0")
    assert cli.main(["compile", "no/model"]) == 2
    assert f"{FOLDER_VARIABLE} is off" in capsys.readouterr().err
