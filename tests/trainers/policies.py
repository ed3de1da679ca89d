"""Texts whose best actions are known, and a policy that may learn them."""

from pathlib import Path
from typing import Any

import torch

from transformers_resps import TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.replay import OutcomeTable, TextOutcomes
from transformers_resps.trainers.policy_config import PolicyTrainingConfig
from transformers_resps.trainers.rollouts import ReplayRollouts


GRID = ActionGrid((TreeShape.plain(), TreeShape(4, 3, 1), TreeShape(9, 8, 1)))
SECONDS = torch.tensor([1.0, 1.3, 2.0])
LONGEST = torch.tensor([[1, 1, 1], [1, 3, 3], [1, 4, 9]])  # emitted, by context: plain, short and deep trees are best
FEATURES = 12


def task(texts: int, seed: int) -> ReplayRollouts:
    """Texts of runs of three contexts, visible in noisy features; the best action of each is its own number."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(99))
    made = []
    for _ in range(texts):
        contexts = torch.randint(3, (4,), generator=generator).repeat_interleave(12)
        left = len(contexts) - torch.arange(len(contexts))
        noise = 0.2 * torch.randn(len(contexts), FEATURES, generator=generator)
        emitted = LONGEST[contexts].minimum(left[:, None])
        made.append(TextOutcomes(prototypes[contexts] + noise, emitted, SECONDS.expand(len(contexts), 3)))
    return ReplayRollouts(OutcomeTable(made))


def config(folder: Path, **changes: Any) -> PolicyTrainingConfig:
    """Updates of eight steps, of which there are 30."""
    settings = {"max_steps": 240, "num_ppo_epochs": 4, "num_mini_batches": 2, "learning_rate": 5e-3}
    quick = {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    return PolicyTrainingConfig(str(folder), **{**settings, **quick, **changes})


def policy(**changes: Any) -> ReSpSPolicy:
    return ReSpSPolicy(ReSpSConfig(FEATURES, GRID, persistence=1, **changes))
