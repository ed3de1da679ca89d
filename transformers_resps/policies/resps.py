"""Re-SpS: a small network picks a tree shape from the target's hidden states and keeps it for some steps.

Source: Re-SpS (arXiv 2601.12212), sections 4.1 (state, actions) and 4.3 (persistence, Algorithm 1), and its code,
https://github.com/wmd3i/ReSpS/tree/24786f4. `ReSpSConfig.paper` differs from the code in three points:

- The state concatenates three layers (equation 4); the code averages them for one model and cuts them off for two.
- A decision sets the tree of the same step; the code applies it to the next step and starts with (96, 8, 20).
- Shapes are drawn with a separate random generator, so the text equals that of plain decoding with the same seed.
"""

import math
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tree import TreeShape
from .action_grid import ActionGrid
from .base import Identity, Observation, check_identity_values
from .saving import SavedPolicy, check_known


@dataclass(frozen=True, slots=True)
class ReSpSConfig:
    """Configuration of a `ReSpSPolicy`."""

    feature_size: int  # F: number of layers that the head reads times the target's hidden size
    grid: ActionGrid = field(default_factory=ActionGrid.small)  # the shapes to pick from
    hidden_size: int = 128  # width of both layers of actor and critic
    normalize: bool = True  # normalise the features, see `ActorCritic`
    persistence: int = 30  # steps for which a decision is kept, as in Re-SpS (10 in training: `PolicyTrainingConfig`)
    sample: bool = False  # draw the tree shape, as Re-SpS with maximum entropy does; else take the likeliest
    temperature: float = 1.0  # divisor of the logits before a draw; Re-SpS: 1.5
    target: Identity | None = None  # the target that the policy was trained for; `None` when unknown
    head: Identity | None = None  # the head that the policy was trained for; `None` when unknown

    def __post_init__(self) -> None:
        for name in ("feature_size", "hidden_size", "persistence", "temperature"):
            value, types = getattr(self, name), float | int if name == "temperature" else int
            if not isinstance(value, types) or isinstance(value, bool) or not 0 < value <= 1e9:
                raise ValueError(
                    f"ReSpSConfig got `{name}={value!r}`, but it must be above 0 and at most 1e9, and an integer "
                    "unless it is the temperature. To decide at every step, pass `persistence=1`."
                )
        if not isinstance(self.grid, ActionGrid):
            raise ValueError(
                f"ReSpSConfig got `grid={self.grid!r}`, but it must be an `ActionGrid`. Pass `ActionGrid(shapes)`, or "
                "leave it out for `ActionGrid.small()`."
            )
        check_identity_values("target", self.target)
        check_identity_values("head", self.head)

    @classmethod
    def paper(cls, feature_size: int, **changes: Any) -> "ReSpSConfig":
        """Return the paper's maximum-entropy settings: 177 actions, drawn at temperature 1.5, and raw features."""
        published = cls(feature_size, ActionGrid.paper(), normalize=False, sample=True, temperature=1.5)
        return replace(published, **changes)


class ActorCritic(nn.Module):
    """Two separate MLPs of two tanh layers each, as in Re-SpS: the actor scores tree shapes, the critic rates states.

    `normalize`, which Re-SpS lacks, brings each row of features to mean 0 and variance 1. Otherwise a few dimensions
    of the residual stream are hundreds of times larger than the others and saturate tanh.
    """

    def __init__(
        self, feature_size: int, action_count: int, *, hidden_size: int = 128, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalize = normalize
        # The gains of stable-baselines3, as in Re-SpS: 0.01 makes the actor start with nearly uniform probabilities.
        self.actor = _mlp(feature_size, hidden_size, action_count, gain=0.01)
        self.critic = _mlp(feature_size, hidden_size, 1, gain=1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features `[n, F]` of any dtype to the actor's fp32 logits `[n, a]` and the critic's values `[n]`."""
        states = self.prepare(features)
        return self.actor(states), self.critic(states).squeeze(-1)

    def logits(self, features: Tensor) -> Tensor:
        """Map features `[n, F]` to the actor's logits `[n, a]`, all finite; the critic does not run."""
        logits: Tensor = self.actor(self.prepare(features))
        return logits.nan_to_num()

    def prepare(self, features: Tensor) -> Tensor:
        """Move features `[n, F]` to the networks' device and dtype, replace NaN and infinities by 0, and normalise."""
        weight = self.actor[0].weight
        assert isinstance(weight, Tensor)
        states = features.detach().to(weight.device, weight.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return F.layer_norm(states, states.shape[-1:]).nan_to_num() if self.normalize else states


def _mlp(feature_size: int, hidden_size: int, output_size: int, *, gain: float) -> nn.Sequential:
    sizes = pairwise((feature_size, hidden_size, hidden_size, output_size))
    # fp32, because half precision cannot be made orthogonal
    first, second, last = (nn.Linear(before, after, dtype=torch.float32) for before, after in sizes)
    for layer, scale in ((first, math.sqrt(2)), (second, math.sqrt(2)), (last, gain)):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


class ReSpSPolicy(SavedPolicy):
    """Picks a shape from the features of the last accepted token and keeps it for `persistence` steps.

    All rows of a batch get the same shape, chosen by the mean of their log probabilities. Use an instance for one call
    of `generate` at a time.

    Without `network`, an untrained network is made. `seed` determines its weights and the drawn shapes; the global
    random state does not change.

    Example:
        >>> import torch
        >>> policy = ReSpSPolicy(ReSpSConfig(feature_size=12, persistence=2))
        >>> policy.decide(torch.randn(1, 12)) in policy.config.grid.shapes
        True
    """

    policy_type = "resps"
    grows = False
    needs_drafted_match = False

    def __init__(self, config: ReSpSConfig, network: ActorCritic | None = None, *, seed: int = 0) -> None:
        if not isinstance(config, ReSpSConfig):
            raise ValueError(
                f"`ReSpSPolicy` needs a `ReSpSConfig`, got {config!r}. Pass "
                "`ReSpSConfig(head.config.features_width)`, or load a policy with `AutoPolicy.from_pretrained`."
            )
        if network is not None:
            _check_network(network, config)
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = network or _fresh(config)
        self.network.eval()
        self.uses_lookup = any(shape.lookup for shape in config.grid.shapes)
        self.target_identity, self.head_identity = config.target, config.head
        self._generator = torch.Generator().manual_seed(seed)
        self._held = config.grid[0]
        self._steps_left = 0
        self._last_step = 0

    def __repr__(self) -> str:
        config = self.config
        return f"ReSpSPolicy({len(config.grid)} shapes, persistence={config.persistence}, sample={config.sample})"

    def choose(self, observation: Observation) -> TreeShape:
        """Pick a shape at the first step of a call and every `persistence` steps; else return the last shape."""
        is_new_text = observation.step == 0 or observation.step <= self._last_step  # a guard may take the first steps
        self._last_step = observation.step
        if is_new_text or self._steps_left <= 0:
            self._held = self.decide(self.checked(observation.features))
            self._steps_left = self.config.persistence
        self._steps_left -= 1
        return self._held

    @torch.inference_mode()
    def decide(self, features: Tensor) -> TreeShape:
        """Pick a shape for features `[b, F]`; NaN and infinities count as 0."""
        log_probs = (self.network.logits(features) / self.config.temperature).log_softmax(-1).mean(0)  # [a]
        if self.config.sample:
            action = torch.multinomial(log_probs.softmax(-1).cpu(), 1, generator=self._generator)
        else:
            action = log_probs.argmax()
        return self.config.grid[int(action)]

    def checked(self, features: Tensor | None) -> Tensor:
        """Return the features `[b, F]`; raises `ValueError` if they are `None` or their width is not the config's."""
        width = None if features is None else features.shape[-1]
        if features is None or width != self.config.feature_size:
            raise ValueError(
                f"This policy reads features of width {self.config.feature_size}, but "
                + ("there are none without a draft head" if features is None else f"the head provides {width}")
                + f". It was trained for {(self.config.target or {}).get('name_or_path') or 'another target'}: use "
                "that target with its head, or another policy."
            )
        return features

    def check_identity(
        self, *, target: Identity | None = None, head: Identity | None = None, grid: ActionGrid | None = None
    ) -> None:
        """Raise `ValueError` if the policy was trained for another target, head or grid; `None` fits any."""
        super().check_identity(target=target, head=head)
        if grid is not None and grid != self.config.grid:
            missing = [shape for shape in self.config.grid.shapes if shape not in grid.shapes]
            raise ValueError(
                f"This policy picks from {len(self.config.grid)} shapes, but is used with another grid of "
                f"{len(grid)}, which lacks {len(missing)} of them"
                + (f", for example {missing[0]}" if missing else "")
                + ". Use `policy.config.grid`, or train a policy on the other grid with `PolicyTrainer`."
            )

    def to_config(self) -> dict[str, Any]:
        grid = self.config.grid.to_list()
        return {field.name: getattr(self.config, field.name) for field in fields(self.config)} | {"grid": grid}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        check_known(cls.policy_type, config, tuple(field.name for field in fields(ReSpSConfig)))
        loaded = ReSpSConfig(**{**config, "grid": ActionGrid.from_list(config["grid"])})
        network = _fresh(loaded, "meta")
        network.load_state_dict(tensors, assign=True)
        return cls(loaded, network.float())


def _fresh(config: ReSpSConfig, device: str | None = None) -> ActorCritic:
    """Make an untrained network. On device "meta" it takes no memory, even if a saved config has huge sizes."""
    with torch.device(device or torch.get_default_device()):
        sizes = config.feature_size, len(config.grid)
        return ActorCritic(*sizes, hidden_size=config.hidden_size, normalize=config.normalize)


def _check_network(network: Any, config: ReSpSConfig) -> None:
    if not isinstance(network, ActorCritic) or network.normalize is not config.normalize:
        came = f"`normalize={network.normalize}`" if isinstance(network, ActorCritic) else type(network).__name__
        raise ValueError(
            f"`network` must be an `ActorCritic` with the config's `normalize={config.normalize}`, got {came}. Leave "
            "it out for a fresh one."
        )
    try:
        _fresh(config, "meta").load_state_dict(network.state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"`network` has other sizes than its config ({error}). Pass the network that was made for this config."
        ) from error
