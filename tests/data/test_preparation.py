"""Conversations and datasets in TRL's columns become token ids with a mask."""

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.tokenizers import templated, turns
from transformers_resps.data import Example, make_example, prepare_dataset


REWRITING = "{% for m in messages %}{{ 'ab'[loop.last] + m.content }}{% endfor %}"


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


THOUGHTLESS = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}{% endfor %}"


def prepared(rows: list[dict[str, Any]], tokenizer: Any = None, **how: Any) -> Any:
    given = {"max_length": 20, "vocab_size": 19, **how}
    return prepare_dataset(Dataset.from_list(rows), "train_dataset", tokenizer or templated(), **given)


def read(row: dict[str, Any]) -> tuple[str, str]:
    """The text in letters, without line breaks, which are the unknown token; and what is learned from."""
    letters = [chr(ord("a") + one) for one in row["input_ids"]]
    return "".join(letters).replace("a", ""), "".join(
        one for one, counts in zip(letters, row["loss_mask"], strict=True) if counts
    )


@pytest.mark.parametrize(
    ("row", "text", "learned", "question"),
    [
        ({"messages": turns("de", "fg", "d", "e")}, "hdecifgchdciec", "fgcec", "de"),
        ({"messages": [{"role": "assistant", "content": "ff"}, *turns("de", "fg")]}, "hdecifgc", "fgc", "de"),
        ({"prompt": turns("de"), "completion": turns("", "fg")[1:]}, "hdecifgc", "fgc", "de"),
        ({"prompt": turns("de", "fg", "d"), "completion": turns("", "e")[1:]}, "hdecifgchdciec", "ec", "de"),
        ({"prompt": "def", "completion": "gh"}, "defgh", "gh", "def"),
        ({"text": "defgh"}, "defgh", "defgh", None),
        ({"input_ids": [3, 4, 5, 6]}, "defg", "defg", None),
        ({"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}, "defg", "fg", None),
        ({"input_ids": [3, 4, 5], "completion_mask": [1, 0, 1], "assistant_masks": [1, 1, 1]}, "def", "df", None),
        ({"input_ids": [3, 4, 5, 6], "labels": [-100, -100, -100, 6]}, "defg", "g", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_each_kind_by_hand(row: dict[str, Any], text: str, learned: str, question: str | None) -> None:
    (made,) = prepared([row])
    assert read(made) == (text, learned)
    assert made["length"] == len(made["input_ids"]) and made["question"] == question


def test_a_stream_gives_the_same_rows() -> None:
    rows = [{"messages": turns("de", "fg")}, {"messages": turns("de")}, {"messages": turns("d", "ef")}]
    stream: Any = IterableDataset.from_generator(lambda: iter(rows))
    found = list(prepare_dataset(stream, "train_dataset", templated(), max_length=20, vocab_size=19))
    assert found == list(prepared(rows)) and len(found) == 2


def test_long_texts_are_cut_and_prepared_ones_pass() -> None:
    made = prepared([{"text": "defghi"}], max_length=4)
    assert read(made[0]) == ("defg", "defg")
    assert prepare_dataset(made, "train_dataset", None, max_length=3, vocab_size=3) is made


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "`train_dataset` is empty. Pass a split that has rows"),
        ([{"answer": "d", "topic": "e"}], r"has the columns \['answer', 'topic'\], but needs `messages`"),
        ([{"prompt": "def"}], "the column `prompt` without `completion`.*Let the target write them with `generate`"),
        ([{"text": "def"}, {"text": None}], "Row 1 of `train_dataset`: has the text None, but it must be a string"),
        ([{"text": [3, 4]}], r"Row 0 of `train_dataset`: has the text \[3, 4\], but it must be a string"),
        ([{"messages": "def"}], "Row 0 of `train_dataset`: has messages that are def, but they must be a list"),
        ([{"messages": [{"role": "user"}]}], r"has a message with the fields \['role'\], but it needs"),
        ([{"messages": [{"role": "user", "content": "", "tool_calls": [{"id": 1}]}]}], "with `tool_calls`, but"),
        ([{"prompt": "def", "completion": turns("d")}], "Row 0 of `train_dataset`: has the completion .*both lists"),
        ([{"input_ids": "def"}], "Row 0 of `train_dataset`: has `input_ids` that are def, but they must be a list"),
        ([{"input_ids": [3, 4, 5], "labels": [3]}], "has 3 `input_ids`, but 1 `labels`"),
        ([{"input_ids": [3, 4, 5]}, {"input_ids": [3, 4, 19]}], "Text 1 holds token id 19, .*another model's"),
        ([{"messages": turns("de")}] * 3, "None of the 3 rows of `train_dataset` has an assistant turn"),
        ([{"messages": turns("d" * 50, "e")}], "None of the 1 rows of .* begins within `max_length=20` tokens"),
        ([{"messages": []}], "None of the 1 rows"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_learned_from_is_named_in_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepared(rows)
    assert "\n" not in str(caught.value)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer for it where the target came from.*`processing_class`"):
        prepare_dataset(Dataset.from_list([{"text": "de"}]), "texts", None, max_length=9, vocab_size=19)


def test_rows_that_are_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": turns("d", "ef")}, {"messages": turns("d")}, {"messages": []}]
    assert len(prepared(rows, templated())) == 1
    assert "2 of 3 rows of `train_dataset` have no assistant turn" in caplog.text


def test_where_a_template_rewrites_earlier_turns_the_first_answer_is_used_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"messages": turns("d", "ef", "g", "hi")}, {"messages": turns("d", "ef")}]
    first, second = prepared(rows, templated(THOUGHTLESS))
    assert first["input_ids"] == second["input_ids"]
    assert "in 1 of 2 conversations of `train_dataset`: only their first answers" in caplog.text
    with pytest.raises(ValueError, match="turn by turn"):
        prepared([{"messages": turns("dd", "e")}], templated(THOUGHTLESS))
    with pytest.raises(ValueError, match="turn by turn"):
        prepared([{"messages": turns("d", "e")}], templated(REWRITING))


@pytest.mark.parametrize("tools", [[{"name": "kl"}], '[{"name": "kl"}]'], ids=["list", "json"])
def test_tools_and_settings_of_a_row_reach_the_chat_template(tools: Any) -> None:
    template = (
        "{% for t in tools %}{{ t.name }}{% endfor %}{{ more }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    row = {"messages": turns("de", "fg"), "tools": tools, "chat_template_kwargs": {"more": "n"}}
    (made,) = prepared([row], templated(template))
    assert read(made) == ("klndefg", "fg")
