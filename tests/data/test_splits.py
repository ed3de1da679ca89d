"""Which conversations are held out."""

import random

from transformers_resps.data import split_conversations
from transformers_resps.data.conversations import Conversation


def asked(question: str, *answers: str) -> Conversation:
    said = [{"role": "assistant", "content": answer} for answer in answers]
    return [{"role": "user", "content": question}, *said]


def test_a_conversation_stays_on_its_side_whatever_is_added_and_with_any_answer() -> None:
    letters = random.Random(0)
    questions = ["".join(letters.choices("abcdefgh", k=9)) for _ in range(400)]
    some = [asked(question, "yes") for question in questions]
    train, held_out = split_conversations(some[:200], 0.1)
    assert len(train) + len(held_out) == 200 and 8 <= len(held_out) <= 35
    assert train == [one for one in some[:200] if one in train]
    more_train, more_held_out = split_conversations(some[::-1], 0.1)
    assert all(one in more_train for one in train) and all(one in more_held_out for one in held_out)
    assert held_out == [one for one in more_held_out if one in held_out]  # in the same order
    _, other_answers = split_conversations([asked(question, "no", "never") for question in questions], 0.1)
    assert [one[0] for one in other_answers] == [one[0] for one in more_held_out]


def test_what_has_no_answer_or_no_question_has_a_side_too() -> None:
    odd: list[Conversation] = [[], asked("x"), asked("", "a")[1:]]
    train, held_out = split_conversations(odd, 0.0)
    assert train == odd and held_out == []
