"""The outputs of `generate`, and functions for its callers: pad prompts, cut answers, set a temperature."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..compat import CACHE_KEYWORD
from ..decoding.text import Batch
from ..telemetry.report import SpeculationReport
from .plan import Prepared


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Output of `generate` with a draft head or a policy, and `return_dict_in_generate=True`.

    `past_key_values` is the cache that plain decoding would return, and a later call can continue from it. If rows of
    a batch ended early, the first access builds the cache: it runs the target over these rows' padding, as plain
    decoding does. `speculation` has every step's shape, tokens and seconds.
    """

    speculation: SpeculationReport | None = None


class SpeculativeSeq2SeqOutput(GenerateEncoderDecoderOutput):
    """Output of `generate` for an encoder-decoder, with the same cache and `speculation` as `SpeculativeOutput`.

    `speculation` is an attribute and not an item of the dict, since Whisper's `generate` splits all items by row.
    """

    def __init__(self, *items: Any, speculation: SpeculationReport | None = None, **kept: Any) -> None:
        super().__init__(*items, **kept)
        self.speculation = speculation


def output(
    prepared: Prepared, batch: Batch, report: SpeculationReport, cache: Cache | None
) -> SpeculativeOutput | SpeculativeSeq2SeqOutput | Tensor:
    """Make the return value of `generate`: token ids `[b, s + t]`, or an output object with report and cache."""
    if prepared.streamer is not None:
        prepared.streamer.end()  # as in Transformers, not after an error
    if not prepared.returns_dict:
        return batch.input_ids
    kept: dict[str, Any] = {"sequences": batch.input_ids, "scores": batch.scores, "logits": batch.logits}
    kept[CACHE_KEYWORD] = cache
    made = SpeculativeSeq2SeqOutput if prepared.target.config.is_encoder_decoder else SpeculativeOutput
    return made(**kept, speculation=report)


Ids = TypeVar("Ids", list[int], Tensor)


def end_ids(model: Any) -> frozenset[int]:
    """Return the ids of the tokens that end an answer, from the model's generation config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset(ids if isinstance(ids, list) else () if ids is None else (ids,))


def up_to_end(ids: Ids, ends: Container[int]) -> Ids:
    """Cut an answer `[t]` after its first end token."""
    tokens = ids.tolist() if isinstance(ids, Tensor) else ids
    return ids[: next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))]


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad prompts `[s]` on the left; returns ids and an attention mask, `[b, longest s]` each."""
    masks = [torch.ones_like(prompt) for prompt in prompts]
    ids, mask = (pad_sequence(list(rows), batch_first=True, padding_side="left") for rows in (prompts, masks))
    return ids, mask


def sampling(temperature: float) -> dict[str, Any]:
    """Return keywords that let `generate` decode greedily (temperature 0) or sample from the whole distribution."""
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": 1.0}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
