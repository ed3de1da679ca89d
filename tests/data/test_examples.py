import pytest
import torch

from tests.tokenizers import letter_tokenizer
from transformers_resps.data import Example, make_example


TEMPLATE = (
    "{% for m in messages %}{{ ('h' if m.role == 'user' else 'i') + m.content + 'c' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}i{% endif %}"
)
REWRITING = "{% for m in messages %}{{ 'ab'[loop.last] + m.content }}{% endfor %}"


def templated(template=TEMPLATE):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_mask_marks_exactly_what_the_assistant_wrote():
    """By hand: user "de", assistant "fg" and "c", user "d", assistant "e" and "c"; line breaks are unknown tokens."""
    tokenizer = templated()
    example = make_example(turns("de", "fg", "d", "e"), tokenizer, max_length=99)
    text = "".join(tokenizer.convert_ids_to_tokens(example.input_ids.tolist()))
    assert text.replace("a", "") == "hdecifgchdciec"
    marked = "".join(tokenizer.convert_ids_to_tokens(example.input_ids[example.loss_mask].tolist()))
    assert marked == "fgcec"


def test_predicted_leaves_out_tokens_a_head_cannot_reach():
    example = Example(torch.arange(5), torch.tensor([True, True, True, False, True]))
    assert example.predicted.tolist() == [False, False, True, False, True]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(ValueError, match="turn by turn"):
        make_example(turns("d", "e", "f", "g"), templated(REWRITING), max_length=20)


def test_messages_before_the_completion_are_its_prompt():
    """By hand: of "de", "fg", "d", "e" the completion is the last turn."""
    tokenizer = templated()
    example = make_example(turns("de", "fg", "d", "e"), tokenizer, 99, learn_from=3)
    whole = make_example(turns("de", "fg", "d", "e"), tokenizer, 99)
    assert example.input_ids.tolist() == whole.input_ids.tolist()
    marked = "".join(tokenizer.convert_ids_to_tokens(example.input_ids[example.loss_mask].tolist()))
    assert marked == "ec"
