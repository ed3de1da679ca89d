"""Lossless draft trees inside `generate()` of any Transformers model, shaped at every step by a policy."""

from transformers import AutoConfig, AutoModel

from .generation import ReSpSGenerationMixin, SpeculativeOutput, attach, detach
from .head import DraftHead, DraftHeadConfig
from .policy import FixedPolicy, Level, Observation, Policy
from .telemetry import SpeculationReport, StepRecord
from .tree import DraftTree, TreeShape


AutoConfig.register(DraftHeadConfig.model_type, DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)

__all__ = [
    "DraftHead",
    "DraftHeadConfig",
    "DraftTree",
    "FixedPolicy",
    "Level",
    "Observation",
    "Policy",
    "ReSpSGenerationMixin",
    "SpeculationReport",
    "SpeculativeOutput",
    "StepRecord",
    "TreeShape",
    "attach",
    "detach",
]
