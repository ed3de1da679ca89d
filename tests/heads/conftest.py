"""The target that published heads are read for."""

import pytest
from transformers import PreTrainedModel

from tests.conftest import build_target
from tests.heads.published import LAYERS


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target(num_hidden_layers=LAYERS, initializer_range=0.3)
