"""A tokenizer whose token i is one letter, so that stop strings and text streamers can be checked by eye."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.targets import VOCABULARY


def letter_tokenizer(first: str = "a") -> PreTrainedTokenizerFast:
    """Token 3 is "d", and so on; 0 pads, 2 ends. With another `first` letter every id is another letter's."""
    letters = [chr(ord("a") + index) for index in range(VOCABULARY)]
    start = letters.index(first)
    vocabulary = {letter: index for index, letter in enumerate(letters[start:] + letters[:start])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="a", eos_token="c", model_input_names=["input_ids", "attention_mask"]
    )
