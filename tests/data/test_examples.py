import pytest
import torch

from tests.tokenizers import letter_tokenizer
from transformers_resps.data import Example, choose_draft_vocabulary, make_example, make_examples
from transformers_resps.data.batches import IGNORED, TokenBudgetBatches, collate


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


def test_labels_hold_the_predicted_tokens_and_padding_has_none():
    rows = [
        {"input_ids": torch.tensor([5, 6, 7]), "loss_mask": torch.tensor([False, False, True])},
        {"input_ids": torch.tensor([8, 9, 1, 2]), "loss_mask": torch.tensor([False, False, False, True])},
    ]
    batch = collate(rows)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, IGNORED, IGNORED, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 1, 2]]


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


def test_a_vocabulary_is_not_counted_from_tokens_of_another_tokenizer():
    example = Example(torch.tensor([3, 9, 12]), torch.tensor([False, True, True]))
    with pytest.raises(ValueError, match="token id 12, but the target's vocabulary has 12 tokens. They were"):
        choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=4)


def test_vocabulary_is_the_most_frequent_tokens_with_the_forced_ones():
    mask = torch.tensor([False, *[True] * 9])
    example = Example(torch.tensor([3, 9, 9, 9, 5, 5, 7, 7, 1, 4]), mask)
    vocabulary = choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=4, always=[11])
    assert vocabulary.token_ids.tolist() == [5, 7, 9, 11]
    assert vocabulary.coverage == pytest.approx(7 / 9)
    with pytest.raises(ValueError, match="draft_vocab_size"):
        choose_draft_vocabulary([example], vocab_size=12, draft_vocab_size=13)


def test_batches_keep_to_the_budget_and_hold_every_text_once_per_epoch():
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = TokenBudgetBatches(lengths, 128, seed=3)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        order = list(batches)
        assert len(order) == len(batches)
        assert sorted(i for batch in order for i in batch) == list(range(200))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 128 for batch in order)
        orders.append(order)
    assert orders[0] != orders[1]
