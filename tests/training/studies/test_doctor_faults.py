"""The script that plants faults: each reaches the doctor in the config of a copy, and a miss is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.studies import doctor_faults as script


CONFIG = {"feature_layers": [2, 5, 8], "rope_parameters": {"rope_theta": 1e4}, "norm_before_residual": False}


@pytest.mark.parametrize("blind_to", ["", "rope_theta"])
def test_every_fault_is_planted_in_a_copy_and_a_miss_is_told(
    blind_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    planted: list[dict[str, Any]] = []

    def doctor(command: list[str]) -> int:
        config = json.loads((Path(command[2]) / "config.json").read_text())
        planted.append({name: value for name, value in config.items() if value != CONFIG[name]})
        cures = {"feature_layers": "[2, 5, 8]", "rope_parameters": "10000.0", "norm_before_residual": "False"}
        named = [f"{name.replace('rope_parameters', 'rope_theta')}={cures[name]}" for name in planted[-1]]
        seen = [cure for cure in named if not blind_to or not cure.startswith(blind_to)]
        print(f"a table\nPass {', '.join(seen)}")
        return int(bool(seen))

    monkeypatch.setattr(script, "answer", lambda *_: None)
    monkeypatch.setattr(script.cli, "main", doctor)
    assert script.main(["--target", "target", "--head", str(tmp_path)]) == int(bool(blind_to))
    assert planted == [
        {},
        {"feature_layers": [3, 6, 9]},
        {"feature_layers": [1, 4, 7]},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"norm_before_residual": True},
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert capsys.readouterr().out.count("MISSED") == int(bool(blind_to))
