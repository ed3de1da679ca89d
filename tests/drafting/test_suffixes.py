"""Matches in sorted texts against a scan of them."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_resps.drafting.suffixes import LARGEST_TOKEN, LONGEST_MATCH, SEPARATOR, Suffixes


TEXTS = st.sampled_from([1, 2, 4, 300, LARGEST_TOKEN]).flatmap(lambda largest: st.lists(st.integers(0, largest)))


def scan(tokens: list[int], end: list[int], length: int) -> list[int]:
    """The places in `tokens` after the last `length` tokens of `end`, which stood there side by side."""
    places = range(max(length, 1), len(tokens))
    return [place for place in places if tokens[place - length : place] == end[len(end) - length :]]


def grown(tokens: list[int], pieces: list[int]) -> Suffixes:
    text, start = Suffixes(), 0
    for size in [*pieces, len(tokens)]:
        text.extend(tokens[start : start + size])
        start += size
    return text


@given(tokens=TEXTS, pieces=st.lists(st.integers(0, 90), max_size=8), other=TEXTS, own=st.booleans())
@settings(max_examples=150, deadline=None)
def test_it_finds_what_a_scan_finds_however_the_text_grew(
    tokens: list[int], pieces: list[int], other: list[int], own: bool
) -> None:
    text = grown(tokens, pieces)
    assert list(text.tokens) == tokens
    end = tokens if own else other
    context = Suffixes(end).context
    longest = max(
        (size for size in range(LONGEST_MATCH + 1) if len(end) >= size and scan(tokens, end, size)), default=0
    )
    assert text.search(context).longest == longest
    search = text.search(context)
    for length in range(longest, 0, -1):
        alone = list(text.search(context).run(length, len(tokens)))
        assert sorted(alone) == sorted(search.run(length, len(tokens))) == scan(tokens, end, length)


@given(texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=2, max_size=8), cut=st.data())
@settings(max_examples=100, deadline=None)
def test_no_match_reaches_across_texts_and_the_oldest_go_as_if_they_had_never_been(
    texts: list[list[int]], cut: st.DataObject
) -> None:
    joined = [token for text in texts for token in (*text, SEPARATOR)]
    all_texts = Suffixes(joined)
    lost = cut.draw(st.integers(1, len(joined) - 1))
    kept, place = all_texts.without_first(lost), lost
    while joined[place - 1] != SEPARATOR:
        place += 1
    assert list(kept.tokens) == [SEPARATOR, *joined[place:]]
    for held, tokens in ((all_texts, joined), (kept, list(kept.tokens))):
        for end in texts:
            context = Suffixes(end).context
            longest = held.search(context).longest
            assert longest == max(size for size in range(len(end) + 1) if not size or scan(tokens, end, size))
            for length in range(1, longest + 1):
                assert sorted(held.search(context).run(length, len(tokens))) == scan(tokens, end, length)


def test_a_run_is_sampled_evenly_over_all_its_places() -> None:
    text = Suffixes([7, *range(10)] * 100)
    found = text.search(Suffixes([7]).context).run(1, 24)
    assert 12 <= len(found) <= 24 and set(found) <= set(scan(list(text.tokens), [7], 1))
    assert max(found) - min(found) > 900


@pytest.mark.parametrize("count", [1000, 200_000])
def test_a_token_takes_at_most_sixteen_bytes(count: int) -> None:
    text = Suffixes(np.random.default_rng(0).integers(0, 50_000, count).tolist())
    held = sum(map(sys.getsizeof, (text.tokens, text._backwards, text.order, text._marks, *text._marks)))
    assert held < 16 * count
    assert [text.before(position) for position in text.order] == sorted(map(text.before, range(1, count)))
    for position in range(1, count, count // 50):
        assert text.search(bytes(text.before(position))).longest == min(position, LONGEST_MATCH)
