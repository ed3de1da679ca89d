"""The networks of Re-SpS: an actor over the actions and a critic."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActorCritic(nn.Module):
    """Two separate MLPs with two tanh layers each, as in Re-SpS (arXiv 2601.12212).

    Args:
        feature_size: width F of an observation.
        action_count: a.
        hidden_size: width of both layers.
        normalize: bring each observation to mean 0 and variance 1 first. Re-SpS feeds the raw residual stream, a few
            of whose dimensions are hundreds of times larger than the rest and saturate tanh: a repair, off in the
            paper's preset.
    """

    def __init__(
        self, feature_size: int, action_count: int, *, hidden_size: int = 128, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalize = normalize
        # Gains as in stable-baselines3, which Re-SpS uses: 0.01 for the actor's output, so that it starts uniform.
        self.actor = _mlp(feature_size, hidden_size, action_count, gain=0.01)
        self.critic = _mlp(feature_size, hidden_size, 1, gain=1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, F]` of any dtype -> logits `[n, a]` and values `[n]`, fp32."""
        states = self.prepare(features)
        return self.actor(states), self.critic(states).squeeze(-1)

    def logits(self, features: Tensor) -> Tensor:
        """`[n, F]` -> finite logits `[n, a]`, whatever the features: the actor alone, for use."""
        logits: Tensor = self.actor(self.prepare(features))
        return logits.nan_to_num()

    def prepare(self, features: Tensor) -> Tensor:
        """Features `[n, F]` as the networks read them: fp32, on their device, NaN and infinities as 0, normalised."""
        weight = self.actor[0].weight
        assert isinstance(weight, Tensor)
        states = features.detach().to(weight.device, weight.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return F.layer_norm(states, states.shape[-1:]).nan_to_num() if self.normalize else states


def saved_shapes(feature_size: int, action_count: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of an `ActorCritic`, known without making one."""
    widths = {
        name: (feature_size, hidden_size, hidden_size, last) for name, last in (("actor", action_count), ("critic", 1))
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in widths.items():
        for layer, (before, after) in zip((0, 2, 4), pairwise(sizes), strict=True):  # tanh lies between
            shapes |= {f"{name}.{layer}.weight": (after, before), f"{name}.{layer}.bias": (after,)}
    return shapes


def _mlp(feature_size: int, hidden_size: int, output_size: int, *, gain: float) -> nn.Sequential:
    exact = torch.float32  # whatever the default is: half precision cannot be made orthogonal
    layers = [nn.Linear(feature_size, hidden_size, dtype=exact), nn.Linear(hidden_size, hidden_size, dtype=exact)]
    output = nn.Linear(hidden_size, output_size, dtype=exact)
    for layer, scale in zip([*layers, output], [math.sqrt(2), math.sqrt(2), gain], strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), output)


def seeded_actor_critic(
    feature_size: int, action_count: int, *, hidden_size: int, normalize: bool, seed: int
) -> ActorCritic:
    """A fresh network that depends on `seed` alone and leaves the global random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ActorCritic(feature_size, action_count, hidden_size=hidden_size, normalize=normalize)
