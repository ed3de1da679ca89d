"""Run by two processes at once: two steps of training, the head saved by the main process. Not a test by itself."""

import sys
from pathlib import Path

import torch

from tests.trainers.heads import config, fresh, texts
from transformers_resps.trainers import DraftHeadTrainer


def train(folder: Path, accumulation: int) -> None:
    target, head = fresh()
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_tau", "tau_texts": 2}
    args = config(folder, max_steps=2, gradient_accumulation_steps=accumulation, save_strategy="no", **best)
    trainer = DraftHeadTrainer(head, args, texts(16), texts(4).to_iterable_dataset(), target=target)
    trainer.train()
    assert trainer.state.best_metric  # looked for in every process
    if trainer.accelerator.is_main_process:
        head.save_pretrained(folder / f"of-{trainer.accelerator.num_processes}")


if __name__ == "__main__":
    train(Path(sys.argv[1]), accumulation=1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # at an exit that leaves it to gloo's threads, a process may abort
