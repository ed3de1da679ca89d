"""Simulate tau (tokens per target forward): a head drafts on existing texts, and the target does not run."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting import Committed, DraftCall, LevelSource
from ..policies.fixed import FixedPolicy
from ..replay import RecordedText, decode_again
from ..tree import TreeShape


@torch.no_grad()
def simulated_tau(
    source: LevelSource, target: PreTrainedModel, texts: Iterable[dict[str, Tensor]], shape: TreeShape
) -> float:
    """Return tau, the mean number of tokens per target forward, if the head `source` drafts trees of `shape`.

    The result is at least 1, and exact for texts that the target wrote itself, greedily or by sampling. The target
    does not run, and `shape.lookup` is ignored. Each text has `input_ids` and `loss_mask` `[t]`, and `features`
    `[t, F]`. The last tokens with a true `loss_mask` are the output; the prefill emits the first of them.
    """
    emitted: list[int] = []
    for text in texts:
        tokens, features, mask = text["input_ids"], text["features"], text["loss_mask"]
        begins = 1 if mask.all() else int((~mask).nonzero()[-1]) + 1
        drafter = source.drafter(DraftCall(target))
        if begins > 1:
            drafter.observe(Committed(tokens[None, :begins], features[None, : begins - 1]))
        # Spare room, so that drafts keep their full depth to the end
        known = RecordedText(tokens, begins, features[begins - 1 : len(tokens) - 2], {}, spare_room=shape.depth)
        steps = decode_again(known, FixedPolicy(replace(shape, lookup=0)), drafter)
        emitted += [step.accepted + 1 for step in steps]
    return sum(emitted) / len(emitted) if emitted else 1.0
