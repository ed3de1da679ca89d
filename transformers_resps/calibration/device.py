"""The names of this machine that measurements carry."""

import platform
from pathlib import Path

import torch


_DETAILS = ("model name", "cpu family", "model")  # of Linux; a name alone may stand for several generations


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the CPU with its generation and vector units, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name(Path('/proc/cpuinfo'))}, {torch.backends.cpu.get_cpu_capability()}"


def processor_name(information: Path) -> str:
    """The CPU in a file like `/proc/cpuinfo`; what Python knows of it where there is no such file."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name, family, model = (found.get(detail) for detail in _DETAILS)
    generation = f" (family {family}, model {model})" if family and model else ""
    return f"{name}{generation}" if name else platform.processor() or platform.machine()
