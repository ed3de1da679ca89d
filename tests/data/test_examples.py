import pytest
import torch

from tests.tokenizers import letter_tokenizer
from transformers_resps.data import Example, make_example, make_examples, split_examples


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


def test_an_answer_before_any_question_is_left_out():
    tokenizer = templated()
    assistant_first = [{"role": "assistant", "content": "ff"}, *turns("de", "fg")]
    (example,) = make_examples([assistant_first], tokenizer, max_length=99)
    assert torch.equal(example.input_ids, make_example(turns("de", "fg"), tokenizer, 99).input_ids)


def test_predicted_leaves_out_tokens_a_head_cannot_reach():
    example = Example(torch.arange(5), torch.tensor([True, True, True, False, True]))
    assert example.predicted.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize(
    "conversations",
    [[], [[]], [turns("de")], [turns("", "de")[1:]], [turns("d" * 50, "e")]],
    ids=["none", "empty", "no answer", "no question", "too long"],
)
def test_texts_without_an_answer_are_refused_together(conversations):
    with pytest.raises(ValueError, match="has an assistant turn"):
        make_examples(conversations, templated(), max_length=20)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(ValueError, match="turn by turn"):
        make_example(turns("d", "e", "f", "g"), templated(REWRITING), max_length=20)


def test_where_a_template_rewrites_earlier_turns_the_first_answer_is_used_and_counted(caplog):
    drops_thoughts = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}{% endfor %}"
    tokenizer = templated(drops_thoughts)
    long, short = turns("d", "ef", "g", "hi"), turns("d", "ef")
    first, second = make_examples([long, short], tokenizer, max_length=20)
    assert torch.equal(first.input_ids, second.input_ids)
    assert "in 1 of 2 conversations: only their first answers" in caplog.text
    with pytest.raises(ValueError, match="turn by turn"):
        make_examples([turns("dd", "e")], tokenizer, max_length=20)


def text(prompt: list[int], answer: list[int]) -> Example:
    mask = torch.arange(len(prompt) + len(answer)) >= len(prompt)
    return Example(torch.tensor(prompt + answer), mask)


def test_a_text_stays_on_its_side_whatever_is_added_and_with_any_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 99, (400, 6), generator=generator).tolist()
    texts = [text(prompt, [1, 2]) for prompt in prompts]
    train, held_out = split_examples(texts[:200], 0.1)
    assert len(train) + len(held_out) == 200 and 8 <= len(held_out) <= 35
    more_train, more_held_out = split_examples(texts[::-1], 0.1)
    assert {id(example) for example in train} <= {id(example) for example in more_train}
    assert {id(example) for example in held_out} <= {id(example) for example in more_held_out}
    again, _ = split_examples([text(prompt, [7, 8, 9]) for prompt in prompts], 0.1)
    assert [example.prompt_place for example in again] == [
        example.prompt_place for example in texts if example.prompt_place >= 0.1
    ]
