"""A small target, its head, and texts and settings for a training of seconds."""

import torch
from datasets import Dataset

from tests.conftest import build_target
from transformers_resps import DraftHead
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig


def texts(count=12, vocabulary=64):
    """A dataset of token ids; the first five of each are the prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(9, 24, (1,), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        rows.append({"input_ids": ids.tolist(), "completion_mask": [int(place >= 5) for place in range(length)]})
    return Dataset.from_list(rows)


def config(folder, **overrides):
    short = {"ttt_steps": 3, "tokens_per_batch": 64, "max_length": 64, "max_steps": 6, "save_steps": 3}
    quiet = {"logging_steps": 1, "bf16": False, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return DraftHeadTrainingConfig(str(folder), **short | quiet | overrides)


def fresh(draft_vocab_size=48):
    target = build_target(initializer_range=0.3)
    torch.manual_seed(1)
    return target, DraftHead.from_target(target, draft_vocab_size=draft_vocab_size)


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def check_resumes(folder, target, **overrides):
    """What a head that lies in `start` learns in four steps, whether or not it begins again after two of them."""
    found = []
    for how in ({}, {"resume_from_checkpoint": str(folder / "checkpoint-2")}):
        args = config(folder, max_steps=4, save_steps=2, tau_texts=0, **overrides)
        trainer = DraftHeadTrainer(str(folder / "start"), args, texts(12), target=target)
        trainer.train(**how)
        found.append(bits(trainer.head))
    assert all(torch.equal(found[1][name], weight) for name, weight in found[0].items())
    return found[0]
