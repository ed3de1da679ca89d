"""Lossless speculative decoding with draft trees in Transformers' `generate()`; a policy sizes each step's tree.

A module is imported when one of its names is first used, as in Transformers, so importing the package takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .assistants import AutoDraftHead, MtpHead
    from .calibration import calibrate
    from .drafting.suffix_memory import SuffixMemory
    from .generation.attach import attach, detach
    from .generation.mixin import ReSpSGenerationMixin
    from .generation.output import SpeculativeOutput
    from .heads import BlockHead, BlockHeadConfig, DraftHead, DraftHeadConfig
    from .policies.base import Level, Observation, Policy
    from .policies.costs import CostTable
    from .policies.fixed import FixedPolicy
    from .policies.guard import BaselineGuard
    from .policies.resps import ReSpSPolicy
    from .policies.saving import AutoPolicy
    from .policies.throughput import ThroughputPolicy
    from .telemetry import SpeculationReport, StepRecord
    from .testing import LosslessReport, NotLosslessError, assert_lossless
    from .tree import DraftTree, TreeShape
    from .verifying.prepacking import prepack, unprepack


__all__ = ["AutoDraftHead", "AutoPolicy", "BaselineGuard", "BlockHead", "BlockHeadConfig", "CostTable", "DraftHead"]
__all__ += ["DraftHeadConfig", "DraftTree", "FixedPolicy", "Level", "LosslessReport", "MtpHead", "NotLosslessError"]
__all__ += ["Observation", "Policy", "ReSpSGenerationMixin", "ReSpSPolicy", "SpeculationReport", "SpeculativeOutput"]
__all__ += ["StepRecord", "SuffixMemory", "ThroughputPolicy", "TreeShape", "assert_lossless", "attach", "calibrate"]
__all__ += ["detach", "prepack", "unprepack"]
_HOMES = {
    "assistants": ("AutoDraftHead", "MtpHead"),
    "calibration": ("calibrate",),
    "drafting.suffix_memory": ("SuffixMemory",),
    "generation.attach": ("attach", "detach"),
    "generation.mixin": ("ReSpSGenerationMixin",),
    "generation.output": ("SpeculativeOutput",),
    "heads": ("BlockHead", "BlockHeadConfig", "DraftHead", "DraftHeadConfig"),
    "policies.base": ("Level", "Observation", "Policy"),
    "policies.costs": ("CostTable",),
    "policies.fixed": ("FixedPolicy",),
    "policies.guard": ("BaselineGuard",),
    "policies.resps": ("ReSpSPolicy",),
    "policies.saving": ("AutoPolicy",),
    "policies.throughput": ("ThroughputPolicy",),
    "telemetry": ("SpeculationReport", "StepRecord"),
    "testing": ("LosslessReport", "NotLosslessError", "assert_lossless"),
    "tree": ("DraftTree", "TreeShape"),
    "verifying.prepacking": ("prepack", "unprepack"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            found: object = getattr(import_module(f".{home}", __name__), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
