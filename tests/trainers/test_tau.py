"""Simulated tau."""

import pytest
import torch

from tests.conftest import build_target
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.trainers import FrozenTarget, simulated_tau


def test_simulated_tau_is_that_of_decoding(prompt):
    """The engine writes a text with the head; the simulation, given the text, must count the same steps."""
    target = attach(build_target(initializer_range=0.3, eos_token_id=None))
    torch.manual_seed(0)
    head = DraftHead.from_target(target, draft_vocab_size=64).eval()
    shape = TreeShape(8, 3, 3)
    out = target.generate(
        **prompt,
        assistant_model=head,
        policy=FixedPolicy(shape),
        max_new_tokens=60,
        do_sample=False,
        return_dict_in_generate=True,
    )
    read = FrozenTarget(target, head.config.feature_layers).run(out.sequences)
    tokens = out.sequences[0]
    is_answer = torch.arange(len(tokens)) >= prompt["input_ids"].shape[1]
    text = {"input_ids": tokens, "loss_mask": is_answer, "features": read.features[0]}
    steps = [int(step.emitted) for step in out.speculation.steps]
    assert max(steps) > 1, "the head must guess something for this to mean anything"
    tau = simulated_tau(head, target, [text], shape)
    assert tau == pytest.approx(sum(steps) / len(steps), rel=0.05), steps
