"""Tau of a head on existing texts: the engine's own drafting, without a target forward."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..drafting.candidate_generator import TreeCandidateGenerator
from ..head import BoundHead
from ..policy import FixedPolicy
from ..tree import DraftTree, TreeShape


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
    emitted = forwards = 0
    for text in texts:
        begins = int((~text["loss_mask"]).nonzero()[-1]) + 1 if not text["loss_mask"].all() else 1
        steps = _steps(bound, text, begins, shape)
        emitted += sum(steps)
        forwards += len(steps)
    return emitted / forwards if forwards else 1.0


def _steps(bound: BoundHead, text: dict[str, Tensor], root: int, shape: TreeShape) -> list[int]:
    """Tokens emitted at each step, from `root` on, the newest token that is not yet in the target's cache."""
    tokens, features = text["input_ids"][None], text["features"][None]
    generator, policy = TreeCandidateGenerator(bound, 1, None), FixedPolicy(shape)
    generator.observe(features[:, :root], tokens[:, 1 : root + 1])
    steps = []
    while root < tokens.shape[1] - 1:
        tree = DraftTree.from_pool(tokens[:, root], generator.draft(shape, policy), shape.total_tokens)
        accepted = tree.drafted_match(tokens[:, root + 1 :])[0]
        end = min(root + accepted + 1, tokens.shape[1] - 1)
        steps.append(end - root)
        generator.observe(features[:, root:end], tokens[:, root + 1 : end + 1])
        root = end
    return steps
