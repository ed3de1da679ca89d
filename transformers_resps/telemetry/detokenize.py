"""Finds the text that each token adds; joined, the pieces are the whole text."""

from collections.abc import Callable, Sequence
from typing import Any


Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character that later tokens complete


def decoder(tokenizer: Any) -> Decode:
    """Return how `tokenizer` writes tokens, special ones included and spaces untouched."""

    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


def detokenize_incrementally(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Return what each token adds to the text.

    Decoding one token alone loses leading spaces and cuts characters apart, so each is decoded together with the piece
    before it. A token that only begins a character adds nothing; the token that completes it adds all of it.
    """
    pieces = []
    window, known = 0, 0  # tokens from `window` are decoded together; those before `known` are written already
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[window:end])
        if text.endswith(_UNFINISHED) and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[window:known])) :])
        window, known = known, end
    return pieces


def decode_after(previous: int, token_id: int, decode: Decode) -> str:
    """Return what one token would add after another."""
    return decode([previous, token_id])[len(decode([previous])) :]
