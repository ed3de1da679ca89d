"""What people pass to a trainer who know Transformers' own: refused by name, before something deep inside stumbles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.targets import Architecture
from transformers_resps import DraftHead
from transformers_resps.data import Example
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig, ExampleDataset


TEXT = Example(torch.tensor([3, 4, 5, 6]), torch.tensor([False, False, True, True]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "someone/head"}, "got a str as `model`, but it needs a `DraftHead`. Make one"),
        ({"args": TrainingArguments}, "got a TrainingArguments as `args`, but it needs a `DraftHeadTrainingConfig`"),
        ({"train_dataset": [TEXT]}, "got a list as `train_dataset`, but it needs a `ExampleDataset`"),
        ({"eval_dataset": {"held out": [TEXT]}}, "got a dict as `eval_dataset`"),
        ({"target": "someone/model"}, "`target` is a str, but must be the loaded model"),
    ],
)
def test_a_trainer_of_heads_names_what_it_cannot_use(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    target = Architecture("llama").build("sdpa")
    given: dict[str, Any] = {"model": DraftHead.from_target(target), "target": target, "args": DraftHeadTrainingConfig}
    given |= {"train_dataset": ExampleDataset([TEXT]), **changes}
    given["args"] = given["args"](str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=message):
        DraftHeadTrainer(**given)
