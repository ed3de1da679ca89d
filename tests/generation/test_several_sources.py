"""Several assistants in one call draft one tree, and the text stays plain decoding's."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.assistants import MtpHead
from transformers_resps.assistants.mtp_layouts import MtpConfig


PROMPTS = torch.tensor([[5, 7, 1, 3, 9, 7, 1], [0, 0, 4, 8, 4, 8, 4]])
MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5])


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("qwen3").build("sdpa"))


@pytest.fixture(scope="module")
def sources(target: PreTrainedModel) -> list[Any]:
    """A head, an MTP layer and a small model: the target itself, with other weights in its last layer."""
    torch.manual_seed(1)
    module = MtpHead(MtpConfig(), target).to(target.dtype).eval()
    small = Architecture("qwen3").build("sdpa")
    with torch.no_grad():
        small.model.layers[-1].mlp.down_proj.weight.mul_(0.9)
    return [DraftHead.from_target(target), module, small]


@pytest.mark.parametrize(
    "policy", [FixedPolicy(TreeShape(12, 3, 3)), FixedPolicy(TreeShape(8, 2, 2, lookup=4)), "auto"]
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_their_tree_gives_the_text_of_plain_generate(
    target: PreTrainedModel, sources: list[Any], policy: Any, do_sample: bool
) -> None:
    call = {"attention_mask": MASK, "max_new_tokens": 24, "do_sample": do_sample, "pad_token_id": 0}
    torch.manual_seed(0)
    plain = target.generate(PROMPTS, **call)
    for chosen in (sources, sources[1:]):
        torch.manual_seed(0)
        found = target.generate(PROMPTS, **call, assistant_model=chosen, policy=policy, return_dict_in_generate=True)
        assert found.sequences.tolist() == plain.tolist()
        if policy != "auto":
            assert sum(step.proposed.drafter + step.proposed.both for step in found.speculation.steps) > 5


def test_what_one_is_sure_of_and_another_not_is_drafted(target: PreTrainedModel, sources: list[Any]) -> None:
    """A tree of three sources needs no more steps than that of the first alone."""
    totals = []
    for chosen in (sources, [sources[0]], [sources[2]]):
        found = target.generate(
            PROMPTS[:1],
            max_new_tokens=40,
            do_sample=False,
            assistant_model=chosen,
            policy=FixedPolicy(TreeShape(9, 2, 2)),
            return_dict_in_generate=True,
        )
        totals.append(len(found.speculation.steps))
    assert totals[0] <= totals[1]


def test_a_list_of_one_model_drafts_trees_as_a_longer_one_does(target: PreTrainedModel, sources: list[Any]) -> None:
    with pytest.raises(ValueError, match="decodes without a draft head. Leave out one"):
        target.generate(PROMPTS[:1], assistant_model=sources[2:], policy="plain")
    model = attach(copy.deepcopy(target), policy=FixedPolicy(TreeShape(2, 1, 1)))
    asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(PROMPTS[:1], assistant_model=sources[2:], **asked)
    assert max(step.verified for step in found.speculation.steps) == 2


def test_an_empty_list_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="empty list"):
        target.generate(PROMPTS[:1], assistant_model=[], policy="auto")
