"""Tokenize conversations, with a mask over the tokens that the assistant wrote.

Transformers and TRL find these tokens by `{% generation %}` marks in the chat template. Most templates have none, so
here they are what an assistant turn adds to the rendered text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized text to train on.

    Attributes:
        input_ids: `[t]` token ids.
        loss_mask: `[t]` bool, true for tokens that the assistant wrote, its end-of-turn token included.
    """

    input_ids: Tensor
    loss_mask: Tensor

    @property
    def predicted(self) -> Tensor:
        """`[t]` bool: the assistant's tokens that a head can predict: all but those at the first two positions."""
        mask = self.loss_mask.clone()
        mask[:2] = False
        return mask


def make_example(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    learn_from: int = 0,
    **template: Any,
) -> Example:
    """Tokenize one conversation and mask the tokens that the assistant wrote.

    These are what an assistant turn adds to the rendered text after the generation prompt.

    Args:
        conversation: a list of messages.
        tokenizer: the target's, with its chat template.
        max_length: in tokens; a longer conversation is cut.
        learn_from: index of the first message whose tokens are marked; those before it are the prompt.
        template: more for the chat template, such as `tools`.

    Returns:
        The example.

    Raises:
        ValueError: the chat template rewrites earlier turns, so the assistant's tokens cannot be found.
    """
    pieces: list[tuple[str, bool]] = []
    text = ""
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or index < learn_from:
            continue
        asked = _render(tokenizer, conversation[:index], add_generation_prompt=True, **template)
        answered = _render(tokenizer, conversation[: index + 1], add_generation_prompt=False, **template)
        if not asked.startswith(text) or not answered.startswith(asked):
            raise ValueError(
                f"The chat template does not render conversations turn by turn: turn {index + 1} changes the text "
                "before it. Pass a tokenizer with a template that only appends."
            )
        end = len(answered.rstrip("\n"))  # templates put a line break after the end-of-turn token
        pieces += [(asked[len(text) :], False), (answered[len(asked) : end], True)]
        text = answered[:end]
    ids: list[int] = []
    mask: list[bool] = []
    for piece, is_assistant in pieces:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [is_assistant] * len(tokens)
        if len(ids) >= max_length:
            break
    return Example(torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length]))


def check_token_ids(examples: Iterable[Example], vocab_size: int, *, first_number: int = 0) -> None:
    """Check that texts hold tokens of the target, whose embedding would fail with an unclear error.

    Args:
        examples: the texts.
        vocab_size: the target's vocabulary size.
        first_number: number of the first text, for the error.

    Raises:
        ValueError: an id is outside the vocabulary, or there is a text without tokens.
    """
    for number, example in enumerate(examples, start=first_number):
        if not len(example.input_ids):
            raise ValueError(f"Text {number} has no tokens. Leave out empty texts.")
        odd = example.input_ids[(example.input_ids < 0) | (example.input_ids >= vocab_size)]
        if len(odd):
            raise ValueError(
                f"Text {number} holds token id {int(odd[0])}, but the target's vocabulary has {vocab_size} tokens. "
                "It was made with another model's tokenizer, or holds labels: tokenize it with the target's own."
            )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, **how: Any) -> str:
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    return str(rendered)
