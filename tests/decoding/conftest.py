"""Tiny Llamas, with an end token and without, and a head."""

import pytest
from transformers import PreTrainedModel

from tests.lossless.conftest import head, prompt
from tests.targets import Architecture
from transformers_resps import attach


__all__ = ["head", "prompt"]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))


@pytest.fixture(scope="module")
def endless() -> PreTrainedModel:
    """Without an end token."""
    return attach(Architecture("llama").build("sdpa"))
