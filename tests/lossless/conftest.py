"""A tiny target, a head that guesses for it or for the `target` of a module, and a prompt."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, attach


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2, "max_position_embeddings": 64}).build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
