"""Settings of a policy's training that cannot work are refused by name."""

from typing import Any

import pytest

from transformers_resps.trainers import PolicyTrainingConfig


def config(**changes: Any) -> PolicyTrainingConfig:
    quick = {"max_steps": 16, "save_steps": 8, "use_cpu": True, "report_to": "none"}
    return PolicyTrainingConfig("run", **{**quick, **changes})


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ({"objective": "a2c"}, "`objective` is 'a2c', but it must be one of full_information, ppo, max_entropy_ppo"),
        ({"grid": "large"}, "`grid` is 'large', but it must be one of small, paper"),
        ({"preset": "new"}, "`preset` is 'new', but it must be one of repaired, paper"),
        ({"max_completion_length": 1}, "`max_completion_length` is 1, but it must be a whole number from 2"),
        ({"persistence": 0}, "`persistence` is 0, but it must be a whole number from 1"),
        ({"persistence_in_use": 1.5}, "`persistence_in_use` is 1.5, but it must be a whole number from 1"),
        ({"num_mini_batches": 0}, "`num_mini_batches` is 0, but it must be a whole number from 1"),
        ({"temperature": -1.0}, "`temperature` is -1.0, but it must be at least 0"),
        ({"vf_coef": -0.5}, "`vf_coef` is -0.5, but it must be at least 0"),
        ({"entropy_coef": -0.1}, "`entropy_coef` is -0.1, but it must be at least 0, or None"),
        ({"cliprange": 0.0}, "`cliprange` is 0.0, but it must be above 0"),
        ({"gamma": 1.5}, "`gamma` is 1.5, but it must be from 0 to 1"),
        ({"lam": -0.1}, "`lam` is -0.1, but it must be from 0 to 1"),
        ({"target_init_kwargs": "bf16"}, "`target_init_kwargs` is 'bf16', but it must be a dict or None"),
        (
            {"gradient_accumulation_steps": 2},
            "must be 1: choose `num_mini_batches` instead. See `PolicyTrainingConfig`",
        ),
        ({"max_steps": -1}, "`max_steps` is -1, but it must be a whole number from 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        config(**setting)


def test_steps_that_are_no_whole_updates_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"`max_steps` is 18, but it must be whole updates of 4 steps .*: 16 or 20"):
        config(max_steps=18)
    with pytest.raises(ValueError, match="`save_steps` is 3, but it must be whole updates .*: 4"):
        config(save_steps=3)
    with pytest.raises(ValueError, match="`save_strategy` is .*but it must be 'steps', 'best' or 'no'"):
        config(save_strategy="epoch")
    assert config(save_steps=3, save_strategy="no").steps_per_update == 4
