"""A tiny target with a head that proposes all tokens, and one that proposes some and sees the newest only."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, attach


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module", params=[None, 12])
def head(target: PreTrainedModel, request: pytest.FixtureRequest) -> DraftHead:
    torch.manual_seed(1)
    window = None if request.param is None else 16
    return DraftHead.from_target(target, draft_vocab_size=request.param, sliding_window=window).double().eval()
