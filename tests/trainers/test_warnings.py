from pathlib import Path

import yaml

from transformers_resps.trainers.head_trainer import MIN_USEFUL_TOKENS, warn_if_small


def test_a_run_too_small_to_be_useful_is_announced(caplog):
    assert not warn_if_small(MIN_USEFUL_TOKENS)
    assert not caplog.records
    assert warn_if_small(1000)
    assert "1,000 positions" in caplog.text
    assert "generate_dataset.py" in caplog.text


def test_our_recipe_of_a_first_head_is_not_too_small():
    recipe = Path(__file__).parents[2] / "training" / "recipes" / "head.yaml"
    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert not warn_if_small(told["max_steps"] * told["tokens_per_batch"])
    assert told["warmup_steps"] + told["lr_scheduler_kwargs"]["num_decay_steps"] < told["max_steps"]
