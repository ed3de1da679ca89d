"""Angles computed ahead against those of the head itself."""

import pytest
import torch

from transformers_resps.heads import DraftHead, RopeWindow


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_angles_are_those_of_the_head_wherever_a_text_goes_on(tiny_head: DraftHead, rope_type: str) -> None:
    tiny_head.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    head = DraftHead(tiny_head.config)
    window = RopeWindow(head)
    for start, end in [(0, 3), (3, 9), (9, 300), (250, 260), (299, 700), (2, 4)]:
        for part, own in zip(window.at(start, end), head.rope(torch.arange(start, end)[None]), strict=True):
            assert torch.equal(part, own)
