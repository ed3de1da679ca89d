"""A tiny target, a head that guesses, and a prompt."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.lossless.conftest import head, prompt, target
from transformers_resps import attach


__all__ = ["head", "prompt", "target"]


@pytest.fixture
def model(target: PreTrainedModel) -> Any:
    """An attached target of its own, without defaults."""
    return attach(copy.deepcopy(target))
