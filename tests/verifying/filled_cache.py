"""A cache whose entries can be told apart."""

import torch
from transformers import DynamicCache, LlamaConfig, PretrainedConfig


def filled_cache(length: int, rows: int = 1, config: PretrainedConfig | None = None) -> DynamicCache:
    """Every entry is its own: row, head, slot."""
    cache = DynamicCache(config=config or LlamaConfig(num_hidden_layers=1))
    cache.activate_past_recording()
    if length:
        keys = torch.arange(rows * 2 * length * 3, dtype=torch.float32).reshape(rows, 2, length, 3) + 1
        cache.update(keys, -keys, 0)
    return cache
