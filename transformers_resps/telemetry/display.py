"""Compute the text that each token adds, and advance a progress bar with each forward of a call of `generate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # The text that an incomplete character decodes to, while some of its bytes are missing.


def decoder(tokenizer: Any) -> Decode:
    """Return a function that decodes token ids, keeping special tokens and all spaces."""
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def detokenize_incrementally(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Return the text that each token adds; if several tokens make a character, the last of them adds it.

    A token that is decoded alone loses its leading space and may be part of a character, so each token is decoded
    together with the tokens of the text before it.
    """
    pieces = []
    window, known = 0, 0  # indices of the first token to decode, and of the first whose text is new
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[window:end])
        if text.endswith(_UNFINISHED) and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[window:known])) :])
        window, known = known, end
    return pieces


def decode_after(previous: int, token_id: int, decode: Decode) -> str:
    """Return the text that `token_id` adds after the token `previous`."""
    return decode([previous, token_id])[len(decode([previous])) :]


@contextmanager
def moving(bar: Any, target: nn.Module, rows: int, most_steps: int) -> Iterator[None]:
    """Advance a `tqdm` bar by `rows` in total: evenly at `most_steps` forwards of `target`, by the rest at exit."""
    steps = shown = 0

    def move(*_: Any) -> None:
        nonlocal steps, shown
        steps += 1
        reached = rows * min(steps, most_steps) // most_steps
        bar.update(reached - shown)
        shown = reached

    handle = target.register_forward_hook(move)
    try:
        yield
        bar.update(rows - shown)
    finally:
        handle.remove()
