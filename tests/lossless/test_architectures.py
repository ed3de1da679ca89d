"""The contract on every architecture: with any tree, the tokens of plain `generate` with the same seed."""

from functools import partial

import pytest
import torch
from transformers import set_seed

from tests.lossless.hybrids import AnyShape
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, attach
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.unknown_targets import COMPARED, check_tree_attention


_CASES = [(architecture, attention) for architecture in ARCHITECTURES for attention in architecture.attention]


@pytest.mark.parametrize(("architecture", "attention"), _CASES, ids=lambda case: str(case))
def test_any_tree_gives_the_tokens_of_plain_generate(architecture: Architecture, attention: str) -> None:
    target = attach(architecture.build(attention))
    torch.manual_seed(1)
    head = DraftHead.from_target(target)
    prompts = torch.randint(1, VOCABULARY, (2, 11))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    accepted = 0
    for inputs in (
        {"input_ids": prompts[:1], "attention_mask": mask[:1]},
        {"input_ids": prompts * mask, "attention_mask": mask},
    ):
        for do_sample in (False, True):
            options = {**inputs, "do_sample": do_sample, "max_new_tokens": 22}
            set_seed(3)
            expected = target.generate(**options)
            set_seed(3)
            options |= {"assistant_model": head, "policy": AnyShape(5, VOCABULARY), "return_dict_in_generate": True}
            out = target.generate(**options)
            assert out.sequences.tolist() == expected.tolist()
            accepted += out.speculation.emitted_total - out.speculation.target_forwards * len(expected)
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_probe_agrees_with_every_architecture_that_is_compared(architecture: Architecture) -> None:
    assert architecture.model_type in COMPARED
    target = architecture.build(architecture.attention[0])
    target.config.get_text_config().model_type = "unknown"  # so that the probe runs
    check_tree_attention(partial(TargetForward.of, target))


def test_the_probe_covers_exactly_the_architectures_that_are_compared() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES} == COMPARED
