"""Simulate tau (tokens per target forward): a head drafts on existing texts, and the target does not run."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting import Committed, DraftCall, LevelSource
from ..policies.fixed import FixedPolicy
from ..replay import RecordedText, ReplayedStep, decode_again
from ..tree import TreeShape


@torch.no_grad()
def simulated_tau(
    source: LevelSource, target: PreTrainedModel, texts: Iterable[dict[str, Tensor]], shape: TreeShape
) -> float:
    """Return tau, the mean number of tokens per target forward, if every step drafts a tree of `shape`.

    The result is at least 1, and exact for texts that the target wrote itself, greedily or by sampling. The target
    does not run, and `shape.lookup` is ignored. Each text has `input_ids` and `loss_mask` `[t]`, and `features`
    `[t, F]`. The output is the last stretch of true `loss_mask`; the prefill emits its first token.
    """
    emitted = [step.accepted + 1 for text in texts for step in _decoded_again(source, target, text, shape)]
    return sum(emitted) / len(emitted) if emitted else 1.0


def _decoded_again(
    source: LevelSource, target: PreTrainedModel, text: dict[str, Tensor], shape: TreeShape
) -> Iterator[ReplayedStep]:
    """Yield the steps that would decode the output of `text` with drafts of `source`, with full depth to the end."""
    tokens, features, begins = text["input_ids"], text["features"], _output_start(text)
    drafter = source.drafter(DraftCall(target))
    if begins > 1:
        drafter.observe(Committed(tokens[None, :begins], features[None, : begins - 1]))
    known = RecordedText(tokens, begins, features[begins - 1 : len(tokens) - 2], {}, spare_room=shape.depth)
    return decode_again(known, FixedPolicy(replace(shape, lookup=0)), drafter)


def _output_start(text: dict[str, Tensor]) -> int:
    mask = text["loss_mask"]
    return 1 if mask.all() else int((~mask).nonzero()[-1]) + 1
