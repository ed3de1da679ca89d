"""The contract on every class that sees or hears: the tokens of plain `generate`, and they depend on the pixels."""

import copy
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.lossless.hybrids import SAMPLED, AnyShape, answer, check_counts, compare
from tests.multimodal_targets import TARGETS, VOCABULARY, MultimodalTarget
from transformers_resps import DraftHead, SpeculationReport, attach
from transformers_resps.compat import CACHE_KEYWORD


ALL = os.environ.get("RESPS_MULTIMODAL") == "all"  # every call with every class, else a few of them
SEEDS = range(2 if ALL else 1)
SEEN = [(kind, letter) for kind in TARGETS for letter in kind.media if ALL or letter == kind.letter]
DRAFTED = [kind for kind in TARGETS if str(kind) != "mllama"]  # whose every step needs the mask of its images


@cache
def target_of(kind: MultimodalTarget) -> PreTrainedModel:
    return attach(kind.build())


@cache
def head_of(kind: MultimodalTarget) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target_of(kind))


def check(kind: MultimodalTarget, inputs: dict[str, Any], seed: int = 0, **options: Any) -> SpeculationReport:
    """A call that writes what plain `generate` writes; its report."""
    return compare(target_of(kind), head_of(kind), inputs, seed, policy=AnyShape(seed, VOCABULARY), **options)


def shown(kind: MultimodalTarget, letter: str, count: int = 1, seed: int = 0) -> dict[str, Any]:
    """A prompt with one medium in each row; the second row is padded."""
    return kind.prompt(*(f"...{letter}....", f".{letter}..")[:count], seed=seed)


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
    check_counts(*reports, in_a_row=1)


# Recurrent layers have no static cache, and stock's own makes Gemma 4 Unified write another text.
STATIC = [kind for kind in DRAFTED if not kind.is_recurrent and str(kind) != "gemma4_unified"]


@pytest.mark.parametrize("kind", STATIC if ALL else STATIC[::4], ids=str)
def test_a_static_cache_gives_the_tokens_of_plain_generate(kind: MultimodalTarget) -> None:
    check_counts(check(kind, shown(kind, kind.letter), cache_implementation="static"), in_a_row=1)


TURNS = [pytest.param(".x..", True, id="medium-after another call")]
MORE_TURNS = [
    pytest.param(".x..", False, id="medium-at once"),
    pytest.param("....", True, id="text-after another call"),
    pytest.param("....", False, id="text-at once"),
]


@pytest.mark.parametrize(("message", "between"), TURNS + MORE_TURNS * ALL)
@pytest.mark.parametrize("kind", DRAFTED, ids=str)
def test_a_second_turn_goes_on_from_the_returned_cache(kind: MultimodalTarget, message: str, between: bool) -> None:
    target, turns = target_of(kind), []
    for drafting in ({}, {"assistant_model": head_of(kind), "policy": AnyShape(0, VOCABULARY)}):
        first = answer(target, shown(kind, kind.letter), **drafting)
        if between:
            answer(target, kind.prompt(f".{kind.letter}{kind.letter}.", seed=3), **drafting)
        inputs = kind.follow(first.sequences, message.replace("x", kind.letter), seed=7)
        own = {CACHE_KEYWORD: copy.deepcopy(first[CACHE_KEYWORD])}
        turns.append([first, answer(target, inputs, **own, **drafting)])
    for plain, found in zip(*turns, strict=True):
        assert found.sequences.tolist() == plain.sequences.tolist()
    check_counts(*(found.speculation for found in turns[1]), in_a_row=1)
