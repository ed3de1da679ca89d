"""Targets that see or hear, their heads, and the same call plain and with trees."""

import os
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.lossless.hybrids import AnyShape, compare
from tests.multimodal_targets import TARGETS, VOCABULARY, MultimodalTarget
from transformers_resps import DraftHead, SpeculationReport, TreeShape, attach


ALL = os.environ.get("RESPS_MULTIMODAL") == "all"  # every call with every class, else a few of them
DRAFTED = [kind for kind in TARGETS if str(kind) != "mllama"]  # whose every step needs the mask of its images


def any_shape(seed: int) -> AnyShape:
    """Another shape at every step: all next tokens, all pairs, deep, a chain, looked up, and plain."""
    return AnyShape(seed, shapes=_SHAPES)


_SHAPES = (
    TreeShape(VOCABULARY + 1, 1, VOCABULARY),
    TreeShape(1 + VOCABULARY + VOCABULARY**2, 2, VOCABULARY),
    TreeShape(60, 4, 6),
    TreeShape(6, 5, 1),
    TreeShape(20, 2, VOCABULARY, lookup=5),
    TreeShape(1, 0, 1),
)


@cache
def target_of(kind: MultimodalTarget) -> PreTrainedModel:
    return attach(kind.build())


@cache
def head_of(kind: MultimodalTarget) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target_of(kind))


def check(kind: MultimodalTarget, inputs: dict[str, Any], seed: int = 0, **options: Any) -> SpeculationReport:
    """A call that writes what plain `generate` writes; its report."""
    return compare(target_of(kind), head_of(kind), inputs, seed, policy=any_shape(seed), **options)


def shown(kind: MultimodalTarget, letter: str, count: int = 1, seed: int = 0) -> dict[str, Any]:
    """A prompt with one medium in each row; the second row is padded."""
    return kind.prompt(*(f"...{letter}....", f".{letter}..")[:count], seed=seed)
