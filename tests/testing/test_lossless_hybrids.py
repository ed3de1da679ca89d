"""The kit examines targets with recurrent layers, and finds a mixer whose states were not advanced."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.mutations.bugs.recurrent import one_mixer_stays_behind
from tests.mutations.planting import plant
from tests.recurrent_targets import NEEDS_STATES, recurrent
from transformers_resps import DraftHead, FixedPolicy, NotLosslessError, TreeShape, assert_lossless, attach
from transformers_resps.testing import lossless


pytestmark = NEEDS_STATES
WIDE = FixedPolicy(TreeShape(20, 3, 7))
SHORT: dict[str, Any] = {"seeds": 1, "max_new_tokens": 8}


@pytest.fixture(params=recurrent("qwen3_5_text", "falcon_h1"), ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param.build()


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


def test_a_hybrid_target_is_lossless(target: Any, head: DraftHead) -> None:
    report = assert_lossless(target, head, WIDE, **SHORT)
    assert report.is_lossless and all(check.accepted for check in report.texts if check.is_of_policy)


def test_a_mixer_that_stays_at_its_old_state_is_found(
    target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the probe of the first call, and by the kit once that has passed."""
    monkeypatch.setattr(lossless, "_DISTRIBUTION_OUTPUTS", 1)  # its texts tell
    for error, message in ((ValueError, "between a draft tree and the same"), (NotLosslessError, "NOT explained by")):
        with monkeypatch.context() as planted, pytest.raises(error, match=message):
            plant("verifying.hybrids:RecurrentMixers.keep", one_mixer_stays_behind.instead_of, planted.setattr)
            assert_lossless(target, head, WIDE, **SHORT)
        attach(target).generate(torch.tensor([[3, 4]]), policy="auto", max_new_tokens=2)
