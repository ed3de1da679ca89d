"""Policy training: known best actions are found, runs resume exactly, planted costs are obeyed."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers.policies import FEATURES, GRID, config, policy, task
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.saving import AutoPolicy
from transformers_resps.replay import OutcomeTable, TextOutcomes
from transformers_resps.trainers.policy_config import PolicyTrainingConfig
from transformers_resps.trainers.policy_trainer import RolloutTrainer
from transformers_resps.trainers.rollouts import ReplayRollouts


def known_best_seconds(rollouts: ReplayRollouts) -> float:
    """Seconds of all texts when every step takes the action that is best in its context."""
    table = rollouts.table
    best = (table.emitted - 1.9 * table.seconds).argmax(-1)  # near the rate that this choice attains itself
    total = 0.0
    for start, stop in zip(table.starts.tolist(), table.stops.tolist(), strict=True):
        while start < stop:
            total += float(table.seconds[start, best[start]])
            start += int(table.emitted[start, best[start]])
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "full_information"},
        {"objective": "ppo"},
        {"objective": "max_entropy_ppo"},
        {"objective": "max_entropy_ppo", "reward_func": "mean_rate", "normalize": False},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_each_objective_learns_the_known_best_actions(tmp_path: Path, changes: dict[str, Any]) -> None:
    learner = policy(normalize=changes.pop("normalize", True))
    held_out, reward = task(20, seed=1), changes.pop("reward_func", "tokens_per_second")
    settings = config(tmp_path, **changes)
    trainer = RolloutTrainer(learner, settings, task(40, seed=0), held_out, reward_func=reward)
    trainer.train()
    metrics = trainer.evaluate()
    best = known_best_seconds(held_out)
    tokens = int((held_out.table.stops - held_out.table.starts).sum())
    assert tokens / metrics["eval_tokens_per_second"] < 1.05 * best
    assert metrics["eval_gain_over_best_fixed"] > 1.2
    assert metrics["eval_distinct_actions"] == 3
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"tokens_per_second", "entropy", "distinct_actions", "oracle_regret"} <= logged
    assert ("reward" if reward == "mean_rate" else "gain_regret") in logged
    loaded = AutoPolicy.from_pretrained(tmp_path / "policy")
    assert isinstance(loaded, ReSpSPolicy)
    for name, weight in learner.network.state_dict().items():
        assert torch.equal(weight, loaded.network.state_dict()[name])


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    """What a power cut does after some optimiser steps."""

    def __init__(self, after: int) -> None:
        self._after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._after:
            raise KilledError


@pytest.mark.parametrize("objective", ["full_information", "ppo"])
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, objective: str) -> None:
    changes = {"objective": objective, "max_steps": 48, "save_steps": 16, "persistence": 2}
    whole, broken, resumed = policy(), policy(), ReSpSPolicy(ReSpSConfig(FEATURES, GRID, persistence=1), seed=3)
    RolloutTrainer(whole, config(tmp_path / "whole", **changes), task(9, 0)).train()
    settings = config(tmp_path / "broken", **changes)
    with pytest.raises(KilledError):
        RolloutTrainer(broken, settings, task(9, 0), callbacks=[Kill(after=21)]).train()
    torch.manual_seed(123)  # whatever else the new process did
    RolloutTrainer(resumed, settings, task(9, 0)).train(resume_from_checkpoint=True)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name


class PressCtrlC(TrainerCallback):
    """In the middle of an update, as a user would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 9:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_finishes_the_update_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    changes = {"objective": "ppo", "max_steps": 32, "persistence": 2, "save_strategy": "no"}
    whole, stopped, resumed = policy(), policy(), ReSpSPolicy(ReSpSConfig(FEATURES, GRID, persistence=1), seed=3)
    RolloutTrainer(whole, config(tmp_path / "whole", **changes), task(9, 0)).train()
    settings = config(tmp_path / "stopped", **changes)
    assert 9 % settings.steps_per_update
    trainer = RolloutTrainer(stopped, settings, task(9, 0), callbacks=[PressCtrlC()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert 9 < trainer.state.global_step < settings.max_steps
    assert trainer.state.global_step % settings.steps_per_update == 0
    RolloutTrainer(resumed, settings, task(9, 0)).train(resume_from_checkpoint=True)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name


@pytest.mark.parametrize("objective", ["full_information", "ppo"])
@pytest.mark.parametrize(("deep_seconds", "wanted"), [(1.0, 2), (50.0, 0)], ids=["free", "ruinous"])
def test_planted_costs_on_replayed_texts_are_obeyed(
    tmp_path: Path, objective: str, deep_seconds: float, wanted: int
) -> None:
    table = task(12, seed=0).table
    seconds = torch.tensor([1.0, 1.0 + (deep_seconds - 1.0) / 2, deep_seconds])
    texts = [
        TextOutcomes(table.features[start:stop], table.emitted[start:stop], seconds.expand(stop - start, 3))
        for start, stop in zip(table.starts.tolist(), table.stops.tolist(), strict=True)
    ]
    learner = policy()
    trainer = RolloutTrainer(
        learner, config(tmp_path, objective=objective, max_steps=160), ReplayRollouts(OutcomeTable(texts))
    )
    trainer.train()
    picked = learner.network.logits(table.features).argmax(-1)
    pays = (table.emitted[:, 2] > table.emitted[:, 1]) if wanted else torch.ones(len(picked), dtype=torch.bool)
    assert (picked[pays] == wanted).float().mean() > 0.95


def test_training_goes_on_with_a_single_replayed_text(tmp_path: Path) -> None:
    trainer = RolloutTrainer(policy(), config(tmp_path, max_steps=16, objective="ppo"), task(1, seed=0))
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.policy.network.parameters())


def test_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 replayed texts.*at least one text"):
        OutcomeTable([])
    with pytest.raises(ValueError, match=r"width 12 and 3 actions, but the policy reads width 9 and has 3.*Record"):
        learner = ReSpSPolicy(ReSpSConfig(9, GRID))
        RolloutTrainer(learner, config(tmp_path), task(1, 0)).train()
    with pytest.raises(ValueError, match="`eval_dataset` is missing.*held-out"):
        RolloutTrainer(policy(), config(tmp_path), task(1, 0)).evaluate()
    features, ones = torch.zeros(4, 2), torch.ones(4, 3, dtype=torch.long)
    for seconds in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive, finite time. Measure the costs again"):
            TextOutcomes(features, ones, torch.full((4, 3), seconds))


def test_every_setting_has_a_help() -> None:
    for one in dataclasses.fields(PolicyTrainingConfig):
        assert one.metadata.get("help"), one.name
