"""Every command speaks before it loads its libraries, which can take longer than a user waits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs.announcement import announce


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("training/generate_dataset.py", "generate_dataset.py: Let the target answer prompts"),
        ("training/train_head.py", "train_head.py: Train a draft head"),
        ("training/train_policy.py", "train_policy.py: "),
        ("training/publish.py", "publish.py: Check the folder of a head or a policy"),
        ("resps.py doctor target head", "resps doctor: loading PyTorch and Transformers"),
        ("-m examples.demo", "demo: loading PyTorch and Transformers"),
    ],
)
def test_a_command_says_what_it_does_before_it_loads_pytorch(command: str, said: str, tmp_path: Path) -> None:
    for library in ("torch", "transformers", "datasets", "trl"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('planted')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.startswith(said) and "ImportError: planted" in done.stderr


def test_of_several_ranks_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        announce("Train a head.\n\nMore.")
    assert capsys.readouterr().err.count("Train a head. Loading PyTorch") == 1
