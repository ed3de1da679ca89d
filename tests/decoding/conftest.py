"""Tiny Llamas, with an end token and without, and a head."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, attach


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))


@pytest.fixture(scope="module")
def endless() -> PreTrainedModel:
    """Without an end token."""
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
