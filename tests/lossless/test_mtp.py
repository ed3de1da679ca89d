"""MTP layers draft for their targets, hybrid ones too: every tree gives the text of plain `generate`."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.assistants.mtp_cases import CASES, Case
from tests.lossless.hybrids import SAMPLED, check_counts, compare, padded, tokens
from tests.recurrent_targets import VOCABULARY
from transformers_resps import attach
from transformers_resps.assistants import MtpHead
from transformers_resps.compat import HAS_RECURRENT_STATES


FAMILIES = ["Qwen3.5", "Qwen3-Next", "DeepSeek-V3", "GLM-4.6", "MiMo-7B", "MiMo-V2-Flash", "Step-3.5", "three chained"]
_RECURRENT = ("Qwen3.5", "Qwen3-Next")


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in FAMILIES], ids=str)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    case: Case = replace(request.param, config=request.param.config | {"vocab_size": VOCABULARY, "eos_token_id": None})
    if case.name in _RECURRENT and not HAS_RECURRENT_STATES:
        pytest.skip("this release refuses targets with recurrent layers")
    target = case.build()
    case.write(tmp_path_factory.mktemp("checkpoint"), target, case.raw())
    return attach(target)


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> MtpHead:
    return MtpHead.from_target(target)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (tokens(9), {}),
    "sampled": (tokens(9), SAMPLED),
    "batch": (padded(3), {"eos_token_id": [2]}),
    "batch in lockstep": (padded(3), {"lockstep": True}),
    "sampled batch": (padded(3), SAMPLED | {"eos_token_id": [2]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_text_of_plain_generate(name: str, target: PreTrainedModel, head: MtpHead) -> None:
    inputs, options = CALLS[name]
    check_counts(compare(target, head, inputs, **options), in_a_row=1)
