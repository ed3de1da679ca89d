"""A tokenizer whose token i is one letter, so that stop strings, streamers and templates can be checked by eye."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.targets import VOCABULARY


ON_ONE_LINE = (
    "{% for m in messages %}{{ ('h' if m.role == 'user' else 'i') + m.content + 'c' }}{% endfor %}"
    "{% if add_generation_prompt %}i{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}d{% endif %}"
_TEMPLATE = (
    "{% for m in messages %}{{ ('h' if m.role == 'user' else 'i') + m.content + 'c' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}i{% endif %}"
)


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


def templated(template: str = _TEMPLATE) -> PreTrainedTokenizerFast:
    """With a chat template: "h" begins a user turn, "i" an assistant's, "c" and a line break end both."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
