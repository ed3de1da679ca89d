"""A publication is rehearsed as training/PUBLISHING.md says: by the commands that a user types, in own processes."""

from pathlib import Path

import pytest

from tests.hub.rehearse import main


PUBLISH = ["python", str(Path(__file__).parents[2] / "training" / "publish.py")]


def test_what_would_be_published_is_listed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*PUBLISH, str(folder), "me/head", "--private"]) == 0
    told = capfd.readouterr().out
    assert "published: http://127.0.0.1" in told and "me/head (private) would hold:" in told
    assert "model.safetensors" in told and "custom_generate/generate.py" in told


def test_a_refusal_keeps_its_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["python", "-c", "raise SystemExit('It is partial.')"]) == 1
    told = capfd.readouterr()
    assert "Nothing was published" in told.out and "It is partial." in told.err


def test_without_a_command_the_use_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python -m tests.hub.rehearse" in capsys.readouterr().err
