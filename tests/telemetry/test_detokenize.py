"""Tokens become pieces of text that join to the text."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_resps.telemetry.display import decode_after, decoder, detokenize_incrementally


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as the hardest case of byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_tokenizer()
DECODE = decoder(TOKENIZER)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_pieces_joined_are_the_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    pieces = detokenize_incrementally(ids, DECODE)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    assert detokenize_incrementally(TOKENIZER("a🎉b")["input_ids"], DECODE) == ["a", "", "", "", "🎉", "b"]


def test_a_character_that_is_never_finished_is_shown_as_such() -> None:
    assert detokenize_incrementally(TOKENIZER("é")["input_ids"][:1], DECODE) == ["\ufffd"]


def test_a_piece_keeps_the_space_that_decoding_it_alone_would_drop() -> None:
    words = {1: "the", 2: "fox"}
    assert decode_after(1, 2, lambda ids: " ".join(words[token] for token in ids)) == " fox"
