"""Tokenize conversations, with a mask over the tokens that the assistant wrote.

Transformers and TRL find these tokens by `{% generation %}` marks in the chat template. Most templates have none, so
here they are what an assistant turn adds to the rendered text.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation


logger = logging.getLogger(f"transformers.{__name__}")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized conversation to train on.

    Attributes:
        input_ids: `[t]` token ids.
        loss_mask: `[t]` bool, true for tokens that the assistant wrote, its end-of-turn token included.
    """

    input_ids: Tensor
    loss_mask: Tensor

    @property
    def prompt_place(self) -> float:
        """A number in [0, 1) that depends only on the tokens before the first answer."""
        prompt = self.input_ids[: int(self.loss_mask.int().argmax())]
        return int.from_bytes(hashlib.sha256(prompt.numpy().tobytes()).digest()[:6]) / 2**48

    @property
    def predicted(self) -> Tensor:
        """`[t]` bool: the assistant's tokens that a head can predict: all but those at the first two positions."""
        mask = self.loss_mask.clone()
        mask[:2] = False
        return mask


def make_examples(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Tokenize all conversations that have an assistant turn within `max_length` tokens.

    Assistant turns before the first user turn are left out. If the chat template rewrites earlier turns, as templates
    do that drop old reasoning, only the first answer of the conversation is used; a warning counts these.

    Args:
        conversations: as from `load_conversations`.
        tokenizer: the target's, with its chat template.
        max_length: in tokens; longer conversations are cut.

    Returns:
        One example for each conversation that has a token to learn.

    Raises:
        ValueError: no conversation has one, or the chat template does not append answers to their questions.
    """
    examples, seen, rewritten = [], 0, 0
    for conversation in conversations:
        seen += 1
        asked = _from_first_question(conversation)
        if any(message["role"] == "assistant" for message in asked):
            first = asked[: next(i for i, m in enumerate(asked) if m["role"] == "assistant") + 1]
            try:
                example = make_example(asked, tokenizer, max_length)
            except ValueError:
                if len(first) == len(asked):
                    raise
                example, rewritten = make_example(first, tokenizer, max_length), rewritten + 1
            if example.predicted.any():
                examples.append(example)
    if rewritten:
        logger.warning(
            "The chat template rewrites earlier turns in %d of %d conversations: only their first answers are used.",
            rewritten,
            seen,
        )
    if not examples:
        raise ValueError(
            f"None of the {seen} conversations has an assistant turn that begins within `max_length={max_length}` "
            "tokens. Pass conversations with answers (training/generate_dataset.py makes them), or raise `max_length`."
        )
    return examples


def _from_first_question(conversation: Conversation) -> Conversation:
    roles = [message["role"] for message in conversation]
    first = roles.index("user") if "user" in roles else len(roles)
    return [message for message in conversation[:first] if message["role"] != "assistant"] + conversation[first:]


def make_example(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokenize one conversation and mask the tokens that the assistant wrote.

    These are what an assistant turn adds to the rendered text after the generation prompt.

    Args:
        conversation: a list of messages.
        tokenizer: the target's, with its chat template.
        max_length: in tokens; a longer conversation is cut.

    Returns:
        The example.

    Raises:
        ValueError: the chat template rewrites earlier turns, so the assistant's tokens cannot be found.
    """
    pieces: list[tuple[str, bool]] = []
    text = ""
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, conversation[:index], add_generation_prompt=True)
        answered = _render(tokenizer, conversation[: index + 1], add_generation_prompt=False)
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


def check_token_ids(examples: Iterable[Example], vocab_size: int) -> None:
    """Check that texts hold tokens of the target, whose embedding would fail with an unclear error.

    Raises:
        ValueError: an id is outside the vocabulary, or there is a text without tokens.
    """
    for number, example in enumerate(examples):
        if not len(example.input_ids):
            raise ValueError(f"Text {number} has no tokens. Leave out empty texts.")
        odd = example.input_ids[(example.input_ids < 0) | (example.input_ids >= vocab_size)]
        if len(odd):
            raise ValueError(
                f"Text {number} holds token id {int(odd[0])}, but the target's vocabulary has {vocab_size} tokens. "
                "It was made with another model's tokenizer, or holds labels: tokenize it with the target's own."
            )


def split_examples(examples: Iterable[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those held out.

    The prompt alone decides: an example stays on its side when the dataset grows, and all answers to one prompt are on
    the same side.

    Args:
        examples: all examples.
        share: about how much to hold out, 0 to 1.

    Returns:
        The training examples and the held-out ones.
    """
    training: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        (held_out if example.prompt_place < share else training).append(example)
    return training, sorted(held_out, key=lambda example: example.prompt_place)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, add_generation_prompt: bool) -> str:
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(rendered)
