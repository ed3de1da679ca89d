"""Many prompts of one length, answered at once: what one processor decodes fastest.

No padding means no mask, keys are written in place, heads that share keys are never copied, and rows that have ended
leave the batch. Knows models and tokens; nothing of texts or files.
"""

from collections.abc import Container
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.target.gqa_attention import attend


class PreallocatedLayer(DynamicLayer):
    """A full-attention layer that writes into one buffer, instead of copying all its past at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.key_buffer = key_states.new_empty(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.value_buffer = value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.keys, self.values = self.key_buffer[:, :, :0], self.value_buffer[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.key_buffer, self.value_buffer = self.key_buffer[rows], self.value_buffer[rows]
        self.keys, self.values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]


def new_cache(model: Any, capacity: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.keep_rows(rows)
        else:
            layer.batch_select_indices(rows)


@torch.inference_mode()
def answer(
    model: Any, prompts: list[list[int]], temperature: float, max_new_tokens: int, eos_ids: Container[int], seed: int
) -> list[list[int]]:
    """Decode all `prompts` (of one length) at once; each answer is cut after its first end token."""
    input_ids = torch.tensor(prompts, device=model.device)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    cache = new_cache(model, input_ids.shape[1] + max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # row of the batch -> index of the prompt
    attention = model.config._attn_implementation
    for step in range(max_new_tokens):
        if step < 2:
            model.set_attn_implementation(attention if step == 0 else decoding_attention(model))
        logits = model(input_ids=input_ids, **{CACHE_KEYWORD: cache}, use_cache=True, logits_to_keep=1).logits
        logits = logits[:, -1].float()
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)
        for row, token in enumerate(tokens.tolist()):
            if not answers[alive[row]] or answers[alive[row]][-1] not in eos_ids:
                answers[alive[row]].append(token)
        running = [row for row, index in enumerate(alive) if answers[index][-1] not in eos_ids]
        if not running:
            break
        if len(running) <= 0.85 * len(alive):
            rows = torch.tensor(running, device=model.device)
            keep_rows(cache, rows)
            tokens, alive = tokens[rows], [alive[row] for row in running]
        input_ids = tokens[:, None]
    model.set_attn_implementation(attention)
    return answers


def decoding_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` under the name and with the arguments that Transformers' models ask for: `[b, 1, heads, hd]`."""
    return attend(query, key, value, attention_mask, scaling=scaling).transpose(1, 2), None


def decoding_attention(model: Any) -> str:
    """Faster than SDPA itself on a processor, four times at 96 rows with 250 tokens and nine at 14 heads on 2."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return str(model.config._attn_implementation)
    AttentionInterface.register("grouped", decoding_attention_forward)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    return "grouped"
