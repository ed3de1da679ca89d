"""Prompts in tokens."""

from typing import Any

import torch
from torch import Tensor

from .conversations import Conversation


def to_tokens(messages: Conversation, tokenizer: Any) -> Tensor:
    """Return token ids `[s]`, through the chat template where there is one."""
    if tokenizer.chat_template is None:
        return torch.tensor(tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"])
    return torch.tensor(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
