"""The contract on the pretend device: its texts are those of plain decoding on the CPU."""

from typing import Any
from unittest.mock import patch

import torch

from transformers_resps import FixedPolicy, TreeShape
from transformers_resps.verifying.invariant import calls

from .counting import Count
from .device import held, on_device
from .pair import pair
from .steps import generate, moved_pair, prompt


_NEW_TOKENS = 24
_TREE = {"with_head": True, "policy": FixedPolicy(TreeShape(12, 4, 3, lookup=4))}
_SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
# How the text is written, and what makes it a tree's.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, _TREE),
    "auto": ({}, {"with_head": True, "policy": "auto"}),
    "lookups": ({}, {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=8))}),
    "sampled": (_SAMPLED, _TREE),
    "processed": ({"repetition_penalty": 1.3}, _TREE),
    "sampled and processed": (_SAMPLED | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, _TREE),
    "with an end": ({"eos_token_id": [5, 77]}, _TREE),
    "in chunks": ({"prefill_chunk_size": 16}, _TREE),
    "batch": ({"padded": True}, _TREE),
    "batch with ends": ({"padded": True, "eos_token_id": [5, 77]}, _TREE),
    "sampled batch": ({"padded": True} | _SAMPLED, _TREE),
    "with one text": ({"invariant": True}, {"with_head": True, "policy": FixedPolicy(TreeShape(40, 4, 8))}),
    "batch with one text": ({"padded": True, "invariant": True, "eos_token_id": [5, 77]}, _TREE),
    "in static buffers": ({"cache_implementation": "static", "disable_compile": True}, _TREE),
}


def texts(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """Write one of `CALLS` plainly on the CPU, and with trees on the device."""
    writing, drafting = CALLS[name]
    writing = dict(writing)
    is_padded = writing.pop("padded", False)
    ids = prompt(rows=3 if is_padded else 1)
    mask = torch.ones_like(ids)
    if is_padded:
        mask = (torch.arange(ids.shape[1]) >= torch.tensor([[0], [9], [20]])).long()
        ids = ids * mask
    writing["max_new_tokens"] = _NEW_TOKENS
    plain = generate(pair(), ids, attention_mask=mask, **writing)
    with Count(), patch.object(calls, "_of_weights", lambda *_: ()):
        drafted = generate(moved_pair(), on_device(ids), attention_mask=on_device(mask), **writing, **drafting)
    return plain.tolist(), held(drafted).tolist()
