"""One verdict over all answers at once, and models that learn a text in seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_resps.drafting import TrainableSource
from transformers_resps.tools.diagnosis import Diagnosis
from transformers_resps.tools.doctor import LabelledText, Probe


Pair = tuple[PreTrainedModel, Path, list[LabelledText]]  # a target, the folder of what drafts for it, and answers


def diagnose(target: PreTrainedModel, head: TrainableSource, answers: Sequence[LabelledText]) -> Diagnosis:
    probe = Probe(target, head, has_images=any(answer.shown for answer in answers))
    probe.add(answers)
    return probe.diagnosis()


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int = 120) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
