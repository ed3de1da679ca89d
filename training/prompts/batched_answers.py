"""Prompts of unequal lengths, answered together.

Greedy batches decode with `policy="auto"`: every row advances on its own, rows that ended leave the batch, and drafts
are verified where they cost less than they give, which is in small batches. Sampled batches decode plain: their rows
would have to advance in lockstep, which leaves drafts little to gain, and so a seed gives the same answers in every
dtype.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from transformers_resps import DraftHead
from transformers_resps.generation.output import end_ids, left_padded, sampling, up_to_end


Prompt = TypeVar("Prompt")


def batches(
    prompts: Sequence[Prompt],
    length: Callable[[Prompt], int],
    temperatures: Sequence[float],
    batch_size: int,
    seed: int,
) -> list[tuple[float, list[Prompt]]]:
    """Group prompts by temperature and length, in random order: a run that stops early has seen every length.

    Each prompt gets the next of `temperatures`, so the shares do not depend on the batches.
    """
    found = []
    for temperature in dict.fromkeys(temperatures):
        own = [
            prompt for place, prompt in enumerate(prompts) if temperatures[place % len(temperatures)] == temperature
        ]
        own.sort(key=length)
        count = -(-len(own) // batch_size)
        ends = [len(own) * number // count for number in range(count + 1)] if own else []
        found += [(temperature, own[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    random.Random(seed).shuffle(found)
    return found


def answer(
    model: Any,
    head: DraftHead | None,
    prompts: Sequence[list[int]],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """Answer prompts of any lengths with an attached model, each up to its first end token.

    At temperature 0 each answer is the one that plain `generate` gives to its prompt alone, exactly in float32.
    """
    ids, mask = left_padded([torch.tensor(prompt, device=model.device) for prompt in prompts])
    drafting = {"policy": "auto", "assistant_model": head} if temperature == 0 else {"policy": "plain"}
    ends = end_ids(model)
    torch.manual_seed(seed)
    written = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=min(ends, default=0),
        **sampling(temperature),
        **drafting,
    )
    return [up_to_end(row, ends) for row in written[:, ids.shape[1] :].tolist()]
