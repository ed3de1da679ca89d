"""Answers one prompt plainly and with draft trees, and records every step."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..generation.state import SpeculationDefaults
from ..heads import DraftHead
from ..policies import Policy
from ..telemetry.report import SpeculationReport
from ..testing import Divergence, explain_divergence
from ..testing.divergence import first_difference
from .recorder import RecordedStep, Recorder


@dataclass(frozen=True, slots=True)
class Examination:
    """Both answers to one prompt, and all steps of the second.

    Attributes:
        prompt_ids: `[s]`.
        plain_ids: `[t]` what plain decoding wrote.
        plain_seconds: of that whole call.
        report: of the call with draft trees, one row.
        seconds: of that whole call.
        steps: its decisions and trees, one for each of `report.steps` but the prefill.
        divergence: where greedy answers differ first, and why; `None` when they are equal or were sampled.
    """

    prompt_ids: Tensor
    plain_ids: Tensor
    plain_seconds: float
    report: SpeculationReport
    seconds: float
    steps: list[RecordedStep]
    divergence: Divergence | None

    @property
    def parts_at(self) -> int | None:
        """The first token in which the answers differ; `None` when they are equal."""
        return first_difference(self.plain_ids.tolist(), self.report.answers[0])


def examine(
    model: PreTrainedModel,
    head: DraftHead | None,
    policy: Policy,
    prompt_ids: Tensor,
    *,
    settings: dict[str, Any],
    seed: int = 0,
) -> Examination:
    """Answer one prompt plainly, then with draft trees.

    Args:
        model: attached.
        head: drafts; `None` for policies that need none.
        policy: decides.
        prompt_ids: `[s]`.
        settings: keywords of `generate`, for both; greedy unless they say otherwise.
        seed: of both; the global generator is left as it was.
    """
    settings = {"do_sample": False} | settings

    def answer(**keywords: Any) -> tuple[Any, Tensor, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            started = time.perf_counter()
            ids = prompt_ids[None].to(model.device)
            call: Any = model
            output = call.generate(
                ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings, **keywords
            )
            tokens = output.sequences[0, len(prompt_ids) :].cpu()  # reading them waits for the device
            return output, tokens, time.perf_counter() - started

    recorder = Recorder(policy)
    with SpeculationDefaults.suspended():
        _, plain_ids, plain_seconds = answer()
        output, own_ids, seconds = answer(assistant_model=head, policy=recorder)
    divergence = None if settings["do_sample"] else explain_divergence(model, prompt_ids, plain_ids, own_ids)
    return Examination(prompt_ids, plain_ids, plain_seconds, output.speculation, seconds, recorder.steps, divergence)
