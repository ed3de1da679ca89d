"""A compiler beside calls: one process of several, told once, and no fault that costs more than a line."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from transformers_resps.compilation import beside
from transformers_resps.compilation.beside import CompilerProcess
from transformers_resps.compilation.packages import FOLDER_VARIABLE


pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are started beside others on POSIX only")

_STAYS = "import time; time.sleep(60)"
_FAILS = "import sys; sys.exit('a warning\\nresps compile: the disk is full.')"
_TELLS = "import os, sys; print(os.getpriority(os.PRIO_PROCESS, 0), *sys.argv[1:], file=open(sys.argv[2], 'w'))"


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CompilerProcess]]:
    """Three, as of three processes, over one folder; what they would run is planted."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    monkeypatch.setattr(beside, "compiler", lambda: "g++")
    monkeypatch.setattr(beside, "_RUN", _STAYS)
    made = [CompilerProcess() for _ in range(3)]
    yield made
    for one in made:
        if one.is_running:
            process(one).kill()
            process(one).wait()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def taken() -> list[str]:
        messages = caplog.messages[:]
        caplog.clear()
        return messages

    return taken


def process(compiler: CompilerProcess) -> "subprocess.Popen[bytes]":
    assert compiler._process is not None
    return compiler._process


def ended(compiler: CompilerProcess) -> None:
    deadline = time.monotonic() + 60
    while compiler.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_three_processes_one_compiles_and_when_it_is_killed_another_may(
    compilers: list[CompilerProcess], told: Callable[[], list[str]], tmp_path: Path
) -> None:
    for one in compilers:
        one.start("model", "folder", "--rows", "1")
    assert [one.is_running for one in compilers] == [True, False, False]
    line, *later = told()
    assert "Another process compiles" in line and str(tmp_path / "compiled") in line and "`compile=False`" in line
    assert later == ["An earlier process compiles this model, and calls use its code when it is ready."] * 2
    compilers[1].start("model", "folder", "--rows", "1")
    assert not told(), "it was said"
    process(compilers[0]).kill()
    ended(compilers[0])
    assert "is not compiled beside calls: its process ended with status -9" in told()[0]
    compilers[1].start("model", "folder", "--rows", "1")
    assert compilers[1].is_running
    assert [path.suffix for path in (tmp_path / "compiled").iterdir() if path.suffix != ".lock"] == [".log"]


def test_other_models_compile_at_the_same_time(compilers: list[CompilerProcess]) -> None:
    for number, one in enumerate(compilers):
        one.start(f"model {number}", "folder")
    assert all(one.is_running for one in compilers)


def test_it_runs_the_command_with_less_priority_and_once(
    compilers: list[CompilerProcess],
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(beside, "_RUN", f"import os; os.nice({beside._NICENESS}); {_TELLS}")
    compiler, written = compilers[0], tmp_path / "written"
    for _ in range(2):
        compiler.start("model", str(written), "head", "--rows", "1")
        ended(compiler)
        assert not list((tmp_path / "compiled").glob(".*.log"))
    assert told()[1:] == ["This model is compiled, and calls use its code from now on."]
    priority, *arguments = written.read_text().split()
    assert int(priority) == min(os.getpriority(os.PRIO_PROCESS, 0) + beside._NICENESS, 19)
    assert arguments == ["compile", str(written), "head", "--rows", "1", "--only-as", "model"]
    written.unlink()
    compiler.start("model", str(written), "head", "--rows", "1")
    assert not compiler.is_running and not written.exists(), "it has been done"
    compiler.start("model", str(written), "head", "--rows", "2")
    ended(compiler)
    assert written.exists(), "a batch has code of its own"


def test_it_compiles_with_this_processs_settings_of_inductor(
    compilers: list[CompilerProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchao changes such settings when it quantizes a model."""
    tells = "import sys, torch; print(torch._inductor.config.codegen_config(), file=open(sys.argv[2], 'w'))"
    monkeypatch.setattr(beside, "_RUN", tells)
    changes = {"coordinate_descent_tuning": True, "triton.unique_kernel_names": False}
    with torch._inductor.config.patch(changes):
        compilers[0].start("model", str(tmp_path / "written"))
    ended(compilers[0])
    told = set((tmp_path / "written").read_text().splitlines())
    assert {f"torch._inductor.config.{name} = {value}" for name, value in changes.items()} <= told


def test_what_fails_is_told_once_and_not_tried_again(
    compilers: list[CompilerProcess], told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_RUN", _FAILS)
    for _ in range(2):
        compilers[0].start("model", "folder")
        ended(compilers[0])
    assert [line for line in told() if "Another" not in line] == [
        "This model is not compiled beside calls: the disk is full."
    ]


@pytest.mark.parametrize(
    ("folder", "checkpoint", "compiler", "reason"),
    [
        ("0", "folder", "g++", "keeps no compiled code"),
        ("compiled", "", "g++", "was not loaded from a checkpoint"),
        ("compiled", "folder", None, "no C++ compiler is installed"),
        ("a file/compiled", "folder", "g++", f"Set {FOLDER_VARIABLE} to another folder"),
    ],
)
def test_what_stands_in_the_way_is_told_in_one_line(
    folder: str,
    checkpoint: str,
    compiler: str | None,
    reason: str,
    compilers: list[CompilerProcess],
    told: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(FOLDER_VARIABLE, folder if folder == "0" else str(tmp_path / folder))
    monkeypatch.setattr(beside, "compiler", lambda: compiler)
    for _ in range(2):
        compilers[0].start("model", checkpoint, "--rows", "1")
    [line] = told()
    assert reason in line and not compilers[0].is_running
