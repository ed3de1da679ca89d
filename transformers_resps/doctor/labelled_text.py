"""Collects texts whose ends the target wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..generation.output import end_ids, left_padded, up_to_end
from ..generation.state import SpeculationDefaults


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text whose end the target wrote.

    Attributes:
        tokens: `[t]` target vocabulary ids.
        prompt_length: how many of them are the prompt.
    """

    tokens: Tensor
    prompt_length: int


@torch.no_grad()
def write_answers(
    target: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 10
) -> list[LabelledText]:
    """Let `target` answer prompts of `[t]` token ids greedily, a batch at a time."""
    ends = end_ids(target)
    answers = []
    for first in range(0, len(prompts), batch):
        some = [prompt.to(target.device) for prompt in prompts[first : first + batch]]
        ids, mask = left_padded(some)
        width = ids.shape[1]
        with SpeculationDefaults.suspended():
            written = target.generate(  # type: ignore[operator]  # PreTrainedModel does not declare GenerationMixin
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
            ).cpu()
        for row, prompt in zip(written, some, strict=True):
            end = width + len(up_to_end(row[width:], ends))
            answers.append(LabelledText(row[width - len(prompt) : end], len(prompt)))
    return answers
