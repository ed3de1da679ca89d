"""Fits a `ThroughputPolicy` to recorded texts: calibrates a head's scores for each level, on any machine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..policies.acceptance_model import LEVELS, MAX_SCORE, MIN_SCORE, AcceptanceModel, PlattScaling
from ..policies.throughput import ThroughputPolicy
from .recorded_text import RecordedText


_PRIOR = 1.0  # Weight, in observed nodes, of the prior assumption that the head's probabilities are right.
_STEPS = 30  # Steps of Newton's method; a few are enough.
_MIN_SLOPE = 0.1  # Positive, so that a path with a higher score never gets a lower probability.


def fitted_policy(texts: Sequence[RecordedText], top_k: int = 4, **settings: Any) -> ThroughputPolicy:
    """Make a `ThroughputPolicy` that starts with acceptance probabilities fitted to recorded texts.

    `settings` are other arguments of the policy: sizes, and `target` and `head` from `pair_identity`. Raises
    `ValueError` if the texts are not recordings, or have no drafts for this `top_k`.
    """
    odd = [type(text).__name__ for text in texts if not isinstance(text, RecordedText)]
    if not texts or odd:
        raise ValueError(
            f"Got {f'a {odd[0]}' if odd else 'no texts'}, but a policy is fitted to `RecordedText`s. "
            "Make them with `record_pools` from outputs of the target."
        )
    nodes = [_outcomes(text, top_k) for text in texts]
    levels, scores, accepted = (torch.cat([part[place] for part in nodes]) for place in range(3))
    # A block head guesses its positions independently, so its error grows with every level
    most = max(LEVELS, texts[0].depth) if texts[0].block_nodes else LEVELS
    levels = levels.clamp(max=most)
    scalings = [fit_platt_scaling(scores[levels == one], accepted[levels == one]) for one in range(1, most + 1)]
    return ThroughputPolicy(top_k=top_k, acceptance=AcceptanceModel(scalings), **settings)


def fit_platt_scaling(scores: Tensor, accepted: Tensor) -> PlattScaling:
    """Fit Platt scaling to n paths: `scores` `[n]` are their log probabilities by the head, `accepted` `[n]` is bool.

    Newton's method maximises the likelihood, with a weak prior; without paths the result is the identity.
    """
    scores = scores.double().clamp(max=MAX_SCORE)  # the same limit as in `PlattScaling`
    inputs = torch.stack([torch.ones_like(scores), scores - torch.log1p(-scores.exp())], dim=1)
    prior = torch.tensor([0.0, 1.0], dtype=torch.float64)
    scaling = prior.clone()
    for _ in range(_STEPS):
        probs = (inputs @ scaling).sigmoid()
        slope = inputs.T @ (probs - accepted.double()) + _PRIOR * (scaling - prior)
        curvature = (inputs * (probs * (1 - probs))[:, None]).T @ inputs + _PRIOR * torch.eye(2, dtype=torch.float64)
        scaling = scaling - torch.linalg.solve(curvature, slope).clamp(-1.0, 1.0)
    return PlattScaling(float(scaling[0]), max(float(scaling[1]), _MIN_SLOPE))


def _outcomes(text: RecordedText, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for n pooled nodes within the text, `[n]` each: level, score, and whether the text follows the path."""
    if top_k not in text.pools:
        raise ValueError(
            f"The text was recorded with pools of top_k {sorted(text.pools)}, but {top_k} is to be fitted. Record it "
            f"again with `record_pools(..., depths={{{top_k}: ...}})`."
        )
    pool = text.pools[top_k]
    upcoming = text.upcoming(int(pool.levels[-1]))
    right = (pool.nodes_along(upcoming)[..., None] == torch.arange(len(pool.levels))).any(1)
    is_shown = (upcoming[:, pool.levels - 1] >= 0) & (pool.scores > MIN_SCORE)
    levels = pool.levels.expand_as(pool.tokens)
    return levels[is_shown], pool.scores[is_shown].double(), right[is_shown]
