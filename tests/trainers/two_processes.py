"""Run by two processes at once: two steps of training of a head and of an MTP layer, saved by the main process. Not a
test by itself.
"""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.trainers.heads import config, fresh, texts
from transformers_resps import DraftHead, MtpHead
from transformers_resps.trainers import DraftHeadTrainer


def train(folder: Path, accumulation: int) -> None:
    target, head = fresh()
    torch.manual_seed(2)
    for source in (head, MtpHead.fresh(target)):
        _train(folder, accumulation, target, source)


def _train(folder: Path, accumulation: int, target: PreTrainedModel, source: DraftHead | MtpHead) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_tau", "tau_texts": 2}
    args = config(folder, max_steps=2, gradient_accumulation_steps=accumulation, save_strategy="no", **best)
    trainer = DraftHeadTrainer(source, args, texts(16), texts(4).to_iterable_dataset(), target=target)
    trainer.train()
    assert trainer.state.best_metric  # looked for in every process
    if trainer.accelerator.is_main_process:
        source.save_pretrained(folder / f"{type(source).__name__}-of-{trainer.accelerator.num_processes}")


if __name__ == "__main__":
    train(Path(sys.argv[1]), accumulation=1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # at an exit that leaves it to gloo's threads, a process may abort
