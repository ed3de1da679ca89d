"""The text that each token adds, and a progress bar that moves with the forwards of a call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # Decoded form of the first bytes of a character that later tokens complete.


def decoder(tokenizer: Any) -> Decode:
    """Make a function that decodes tokens, special ones included and spaces untouched."""

    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


def detokenize_incrementally(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Return the text that each token adds; the token that completes a character adds all of it.

    Decoding one token alone loses leading spaces and cuts characters apart, so each is decoded with the piece before.
    """
    pieces = []
    window, known = 0, 0  # first token that is decoded, and first token whose text is new
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[window:end])
        if text.endswith(_UNFINISHED) and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[window:known])) :])
        window, known = known, end
    return pieces


def decode_after(previous: int, token_id: int, decode: Decode) -> str:
    """Return the text that one token adds after another."""
    return decode([previous, token_id])[len(decode([previous])) :]


@contextmanager
def moving(bar: Any, target: nn.Module, rows: int, most_steps: int) -> Iterator[None]:
    """Move a `tqdm` bar by `rows` over up to `most_steps` forwards of the target; the rest follows at the end."""
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
