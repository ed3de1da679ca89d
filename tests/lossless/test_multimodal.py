"""The contract on every class that sees or hears: the tokens of plain `generate`, and they depend on the pixels."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import DynamicCache

from tests.lossless.hybrids import SAMPLED, answer, check_counts
from tests.lossless.multimodal import ALL, DRAFTED, any_shape, check, head_of, shown, target_of
from tests.multimodal_targets import TARGETS, MultimodalTarget
from transformers_resps.compat import CACHE_KEYWORD


SEEDS = range(2 if ALL else 1)
SEEN = [(kind, letter) for kind in TARGETS for letter in kind.media if ALL or letter == kind.letter]


@pytest.mark.parametrize(("kind", "letter"), SEEN, ids=str)
def test_plain_generate_writes_what_it_sees(kind: MultimodalTarget, letter: str) -> None:
    """Else the other tests prove nothing about pixels and sounds."""
    texts = [answer(target_of(kind), shown(kind, letter, 2, seed)).sequences.tolist() for seed in (0, 1)]
    assert all(row != other for row, other in zip(*texts, strict=True))


HOW: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED, "twice": SAMPLED | {"num_return_sequences": 2}}


def calls() -> Iterator[Any]:
    """Text alone and with each medium, one row and two, greedy and sampled."""
    for kind in TARGETS:
        for letter in ("", *(kind.media if kind in DRAFTED else ())):
            few = (1, "greedy") if not letter else (2, "twice") if letter == kind.letter else None
            for count in (1, 2):
                for how in HOW:
                    if ALL or (count, how) == few:
                        yield pytest.param(kind, letter, count, how, id=f"{kind}-{letter or 'text'}-{count}-{how}")


@pytest.mark.parametrize(("kind", "letter", "count", "how"), [*calls()])
def test_any_tree_gives_the_tokens_of_plain_generate(
    kind: MultimodalTarget, letter: str, count: int, how: str
) -> None:
    reports = [check(kind, shown(kind, letter, count, seed), seed, **HOW[how]) for seed in SEEDS]
    check_counts(*reports)


# Recurrent layers have no static cache, and stock's own makes Gemma 4 Unified write another text.
STATIC = [kind for kind in DRAFTED if not kind.is_recurrent and str(kind) != "gemma4_unified"]


@pytest.mark.parametrize("kind", STATIC if ALL else STATIC[::4], ids=str)
def test_a_static_cache_gives_the_tokens_of_plain_generate(kind: MultimodalTarget) -> None:
    check_counts(check(kind, shown(kind, kind.letter), cache_implementation="static"))


TURNS = [pytest.param(2, ".x..", True, id="media-after another call")]
MORE_TURNS = [
    pytest.param(1, ".x..", False, id="medium-at once"),
    pytest.param(2, ".x..", False, id="media-at once"),
    pytest.param(1, "....", True, id="text-after another call"),
    pytest.param(2, "....", False, id="texts-at once"),
]


@pytest.mark.parametrize(("count", "message", "between"), TURNS + MORE_TURNS * ALL)
@pytest.mark.parametrize("kind", DRAFTED, ids=str)
def test_a_second_turn_goes_on_from_the_returned_cache(
    kind: MultimodalTarget, count: int, message: str, between: bool
) -> None:
    target, turns = target_of(kind), []
    prompt, few = shown(kind, kind.letter, count), {"max_new_tokens": 8}
    messages = [message.replace("x", kind.letter)] * count
    for drafting in ({}, {"assistant_model": head_of(kind), "policy": any_shape(0)}):
        own = {CACHE_KEYWORD: DynamicCache(config=target.config)}
        first = answer(target, prompt, **own, **few, **drafting)
        if between:
            answer(target, kind.prompt(f".{kind.letter}{kind.letter}.", seed=3), **few, **drafting)
        inputs = kind.follow(first.sequences, prompt["attention_mask"], *messages, seed=7)
        turns.append([first, answer(target, inputs, **{CACHE_KEYWORD: first[CACHE_KEYWORD]}, **drafting)])
    for plain, found in zip(*turns, strict=True):
        assert found.sequences.tolist() == plain.sequences.tolist()
    check_counts(*(found.speculation for found in turns[1]))
