"""Lossless draft trees inside `generate()` of any Transformers model, shaped at every step by a policy."""

from transformers import AutoConfig, AutoModel

from .calibration import calibrate
from .generation.attach import attach, detach
from .generation.mixin import ReSpSGenerationMixin
from .generation.output import SpeculativeOutput
from .heads import DraftHead, DraftHeadConfig
from .policies import (
    AutoPolicy,
    BaselineGuard,
    CostTable,
    FixedPolicy,
    Level,
    Observation,
    Policy,
    ReSpSPolicy,
    ThroughputPolicy,
)
from .telemetry.report import SpeculationReport, StepRecord
from .testing import LosslessReport, NotLosslessError, assert_lossless
from .tree import DraftTree, TreeShape
from .verifying.prepacking import prepack, unprepack


# Names of version 0.1.
Guard, pack, unpack = BaselineGuard, prepack, unprepack

AutoConfig.register(DraftHeadConfig.model_type, DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)

__all__ = [
    "AutoPolicy",
    "BaselineGuard",
    "CostTable",
    "DraftHead",
    "DraftHeadConfig",
    "DraftTree",
    "FixedPolicy",
    "Level",
    "LosslessReport",
    "NotLosslessError",
    "Observation",
    "Policy",
    "ReSpSGenerationMixin",
    "ReSpSPolicy",
    "SpeculationReport",
    "SpeculativeOutput",
    "StepRecord",
    "ThroughputPolicy",
    "TreeShape",
    "assert_lossless",
    "attach",
    "calibrate",
    "detach",
    "prepack",
    "unprepack",
]
