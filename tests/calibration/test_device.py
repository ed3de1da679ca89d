"""A machine is called by a name that another kind of machine does not have."""

from pathlib import Path

import pytest
import torch

from transformers_resps.calibration import device_name, processor_name


CPUINFO = (
    "processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 99\n"
)


def test_two_generations_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for model in (1, 17):
        (tmp_path / "cpuinfo").write_text(CPUINFO.format(model=model))
        names.append(processor_name(tmp_path / "cpuinfo"))
    assert names == ["AMD EPYC (family 25, model 1)", "AMD EPYC (family 25, model 17)"]


def test_a_system_that_tells_less_still_has_a_name(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "missing")
    (tmp_path / "cpuinfo").write_text("model name: Ash Tray 9\n")
    assert processor_name(tmp_path / "cpuinfo") == "Ash Tray 9"


def test_a_device_has_the_name_of_its_maker_or_else_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert device_name(torch.device("cuda", 1)) == "Card 1"
    assert device_name(torch.device("mps")) == "mps"
    assert torch.backends.cpu.get_cpu_capability() in device_name(torch.device("cpu"))
