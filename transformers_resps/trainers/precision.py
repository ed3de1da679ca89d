"""Whether bf16 autocast pays on this machine."""

from pathlib import Path

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available


_UNITS = {"avx512_bf16", "amx_bf16"}  # of a CPU that multiplies bf16 itself; others convert to fp32 and back
_CPU_INFO = Path("/proc/cpuinfo")


def prefers_bf16(*, use_cpu: bool = False) -> bool:
    """Whether bf16 autocast is faster than fp32 on the device that training will use.

    Args:
        use_cpu: as in `TrainingArguments`: leave an accelerator unused.

    Returns:
        True on an accelerator that multiplies bf16 in hardware, and on a CPU with AVX512-BF16 or AMX.
    """
    if use_cpu or not torch.accelerator.is_available():
        return bool(_UNITS & _cpu_flags())
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return False  # emulated before M3, and no faster than fp32 after
    return bool(is_torch_bf16_gpu_available())


def _cpu_flags() -> set[str]:
    """Instruction sets, by Linux's names; empty where the system does not list them."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        return set(_CPU_INFO.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()
