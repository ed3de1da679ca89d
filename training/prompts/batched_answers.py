"""Many prompts of one length, answered at once: what one processor decodes fastest.

No padding means no mask, keys are written in place, heads that share keys are never copied, and rows that have ended
leave the batch.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from transformers_resps.target.tree_verifier import TreeVerifier
from transformers_resps.tree import DraftTree


_MAX_SHARE = 0.85  # of the rows that are decoded; leaving copies the others' cache, so several leave at once


@torch.inference_mode()
def answer(
    model: Any, prompts: list[list[int]], temperature: float, max_new_tokens: int, eos_ids: Container[int], seed: int
) -> list[list[int]]:
    """Decode all `prompts` (of one length) at once; each answer is cut after its first end token."""
    input_ids = torch.tensor(prompts, device=model.device)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # row of the batch -> index of the prompt
    with TreeVerifier.of(model, input_ids.shape[1]) as verifier:
        logits, _ = verifier.prefill(input_ids, logits_to_keep=1)
        for step in range(max_new_tokens):
            tokens = _pick(logits[:, -1].float(), temperature, generator)
            for row, token in enumerate(tokens.tolist()):
                if not answers[alive[row]] or answers[alive[row]][-1] not in eos_ids:
                    answers[alive[row]].append(token)
            running = [row for row, index in enumerate(alive) if answers[index][-1] not in eos_ids]
            if not running or step + 1 == max_new_tokens:
                break
            if len(running) <= _MAX_SHARE * len(alive):
                verifier.keep_rows(running)
                tokens, alive = tokens[running], [alive[row] for row in running]
            logits, _ = verifier.verify(DraftTree.root_only(tokens))
            verifier.keep(torch.zeros_like(tokens)[:, None], [1] * len(tokens))
    return answers


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)
