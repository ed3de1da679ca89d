"""Mean acceptance length of a head on existing texts: the engine's own drafting, without a target forward."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..drafting.candidate_generator import TreeCandidateGenerator
from ..head import BoundHead
from ..policy import FixedPolicy
from ..replay import RecordedText, decode_again
from ..tree import TreeShape


@torch.no_grad()
def simulated_tau(bound: BoundHead, texts: Iterable[dict[str, Tensor]], shape: TreeShape) -> float:
    """Simulate tau, the mean acceptance length: tokens per target forward when `shape` is drafted at every step.

    Exact for texts that the target itself wrote, greedily or sampled.

    Args:
        bound: the head with what it borrows from its target.
        texts: each with `input_ids` and `loss_mask` `[t]`, and `features` `[t, F]`. The last run of true `loss_mask`
            is the output, and its first token comes from prefill.
        shape: nodes, depth and width of every tree; its `lookup` is not simulated.

    Returns:
        Tau, at least 1; 1 without texts.
    """
    policy, emitted = FixedPolicy(replace(shape, lookup=0)), []
    for text in texts:
        known, generator = after_prompt(bound, text, spare_room=shape.depth)
        emitted += [step.accepted + 1 for step in decode_again(known, policy, generator)]
    return sum(emitted) / len(emitted) if emitted else 1.0


def output_start(text: dict[str, Tensor]) -> int:
    """Where the output of a text begins, see `simulated_tau`."""
    mask = text["loss_mask"]
    return 1 if mask.all() else int((~mask).nonzero()[-1]) + 1


def after_prompt(
    bound: BoundHead, text: dict[str, Tensor], spare_room: int
) -> tuple[RecordedText, TreeCandidateGenerator]:
    """A text whose prompt the head has observed, but for the last position; `spare_room` lets no tree be cut."""
    tokens, features, begins = text["input_ids"], text["features"], output_start(text)
    generator = TreeCandidateGenerator(bound, 1, None)
    if begins > 1:
        generator.observe(features[None, : begins - 1], tokens[None, 1:begins])
    return RecordedText(tokens, begins, features[begins - 1 : len(tokens) - 2], {}, spare_room), generator
