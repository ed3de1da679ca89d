"""Texts of which the target wrote the end. Knows token ids: nothing of tokenizers or files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Answer:
    """A text of which the target wrote the end.

    Attributes:
        tokens: `[t]` target vocabulary ids.
        prompt_length: how many of them were given.
    """

    tokens: Tensor
    prompt_length: int


@torch.no_grad()
def write_answers(
    target: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 10
) -> list[Answer]:
    """Let `target` answer prompts of `[t]` token ids greedily, a batch at a time."""
    settings = target.generation_config
    eos = settings.eos_token_id if settings is not None else None
    stops = torch.tensor(eos if isinstance(eos, list) else [] if eos is None else [eos], dtype=torch.long)
    answers = []
    for first in range(0, len(prompts), batch):
        some = [prompt.to(target.device) for prompt in prompts[first : first + batch]]
        width = max(len(prompt) for prompt in some)
        ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in some])
        mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in some])
        written = target.generate(  # type: ignore[operator]  # PreTrainedModel does not declare GenerationMixin
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
        ).cpu()
        for row, prompt in zip(written, some, strict=True):
            ends = torch.isin(row[width:], stops).nonzero()
            end = width + int(ends[0]) + 1 if len(ends) else len(row)
            answers.append(Answer(row[width - len(prompt) : end], len(prompt)))
    return answers
