"""A memory keeps the newest texts within its bound, finds what a scan finds, and comes back whole or not at all."""

import copy
import os
import pickle
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.drafting.test_suffixes import scan
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import SuffixMemory
from transformers_resps.drafting.continuations import Continuations, Corpus, match_record
from transformers_resps.drafting.prompt_lookup import Lookup
from transformers_resps.drafting.suffixes import LONGEST_MATCH, SEPARATOR, Suffixes
from transformers_resps.tree import LOOKED_UP


def settled(memory: SuffixMemory) -> SuffixMemory:
    """The memory when its thread has merged all that it will."""
    for thread in threading.enumerate():
        if thread.name == "suffix memory":
            thread.join()
    return memory


def texts_of(memory: SuffixMemory) -> list[list[int]]:
    """Oldest first."""
    texts: list[list[int]] = [[]]
    for token in (token for part in memory.corpus.parts for token in part.tokens):
        if token == SEPARATOR:
            texts.append([])
        else:
            texts[-1].append(token)
    return [text for text in texts if text]


def proposed(memory: SuffixMemory, end: list[int], most: int = 8) -> list[tuple[int, int]]:
    found = Continuations(Suffixes(end), [memory.corpus]).grow(most)
    return list(zip(found.tokens, found.parents, strict=True))


def drawn(seed: int, count: int, length: int, largest: int = 300) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, largest, (count, length)).tolist()


def promised_and_kept(rounds: list[list[int]]) -> tuple[float, float, list[float]]:
    """What a text and a memory promise at the same place, before and after these outcomes, and what each one kept.

    After 5 the text had 6, 7 and the memory has 8, 9, each at one place: 0.3 for the first, 0.35 more for the second.
    """
    memory, text = SuffixMemory(), Suffixes([5, 6, 7, 5])
    memory.add([[5, 8, 9]])
    own, sums, kept = Corpus([text], match_record(), LOOKED_UP), list[float](), list[float]()
    for tokens in [*rounds, []]:
        found = Continuations(text, [own, memory.corpus]).grow(4)
        assert sorted(found.tokens) == [6, 7, 8, 9]
        sums.append(sum(found.odds))
        kept.append(len([0 for ours, theirs in zip(tokens, [8, 9], strict=False) if ours == theirs]))
        found.judge_sum(tokens)
    return sums[0], sums[-1], kept[:-1]


def test_a_sum_that_a_text_and_a_memory_promise_in_vain_is_soon_corrected() -> None:
    first, last, _ = promised_and_kept([[1]] * 3)
    assert first == pytest.approx(2 * (0.3 + 0.3 * 0.35))
    right, tried = 4 * 0.98**3, 4 * 0.98**3 + first * (0.98**2 + 0.98 + 1)
    assert last == pytest.approx(first * right / tried) and last < 0.65 * first


def test_a_pair_is_never_valued_above_what_it_kept() -> None:
    _, last, kept = promised_and_kept([[8, 1], [1], [1], [1]] * 100)
    weights = [0.98**age for age in reversed(range(len(kept)))]
    assert last == pytest.approx(sum(map(np.multiply, weights, kept)) / sum(weights), rel=0.01)
    first, last, _ = promised_and_kept([[8, 9, 1]] * 50)
    assert last == first, "nor above what the places promise"


def test_of_a_tree_that_the_text_follows_what_comes_later_is_no_broken_promise() -> None:
    first, last, _ = promised_and_kept([[8]])
    known = first - 0.3 * 0.35  # not 9
    assert last == pytest.approx(first * min((4 * 0.98 + 1) / (4 * 0.98 + known), 1.0))
    assert promised_and_kept([[]])[1] == first


def test_a_memory_learns_from_every_text_what_the_sums_beside_it_are_worth() -> None:
    memory = SuffixMemory()
    memory.add([[5, 8, 9]])
    texts = [Lookup(memories=[memory]) for _ in range(2)]
    for text in texts:
        text.extend([5, 6, 7, 5])
    promised = sum(texts[0].odds)
    texts[0].extend([1])
    texts[1]._found = None  # which was found before
    share = 4 * 0.98 / (4 * 0.98 + promised)
    assert sum(texts[1].odds) == pytest.approx(share * promised)


@given(
    added=st.lists(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=4), max_size=25),
    most=st.integers(30, 200),
)
@settings(max_examples=60, deadline=None)
def test_the_newest_texts_are_kept_within_the_bound(added: list[list[list[int]]], most: int) -> None:
    memory, all_texts = SuffixMemory(most), list[list[int]]()
    for texts in added:
        memory.add(texts)
        all_texts += [text for text in texts if text]
        assert len(memory) <= most
        kept = texts_of(memory)
        whole = kept[1:]  # the oldest may be cut where one call added more than there is room for
        assert whole == all_texts[len(all_texts) - len(whole) :]
        if kept:
            assert kept[0] == all_texts[-len(kept)][-len(kept[0]) :]
    if sum(len(text) + 1 for text in all_texts) <= most:
        assert texts_of(memory) == all_texts


def test_what_followed_most_often_is_proposed_first_and_branches_share_their_beginning() -> None:
    memory = SuffixMemory()
    memory.add([[1, 2, 3, 4]] * 5 + [[1, 2, 3, 9]] * 3 + [[1, 2, 8]])
    assert proposed(memory, [6, 1, 2], 4) == [(3, -1), (4, 0), (9, 0), (8, -1)]
    assert proposed(memory, [7]) == []


def test_a_hostile_memory_is_soon_distrusted_and_a_good_one_trusted() -> None:
    memory = SuffixMemory()
    memory.add([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13]])

    def odds(end: list[int], token: int | None = None) -> float:
        found = Continuations(Suffixes(end), [memory.corpus])
        if token is not None:
            found.judge([token])
        return max(found.grow(1).odds, default=0.0)

    before, beside = odds([1, 2, 3]), odds([1, 2, 3, 4, 5, 6])
    for _ in range(20):
        odds([1, 2, 3], 9)
    assert odds([1, 2, 3]) < 0.25 * before
    assert odds([8, 9, 10]) == odds([1, 2, 3]), "it is learned for all matches of that length and count"
    assert odds([1, 2, 3, 4, 5, 6]) == beside
    for _ in range(60):
        odds([1, 2, 3], 4)
    assert odds([1, 2, 3]) > before


def test_many_additions_find_what_one_scan_finds_in_few_segments() -> None:
    memory, texts = SuffixMemory(400_000), drawn(0, 2000, 100)
    for start in range(0, 2000, 20):
        memory.add(texts[start : start + 20])
    parts = settled(memory).corpus.parts
    assert sum(map(len, parts)) == 2000 * 101
    assert len(parts) <= 6
    joined = [token for part in parts for token in part.tokens]
    for end in texts[::250]:
        context = Suffixes(end[:40]).context
        found = {part: list(part.search(context).run(2, 10**6)) for part in parts}
        assert sum(map(len, found.values())) == len(scan(joined, end[:40], 2))


def test_a_full_memory_forgets_the_oldest_and_learns_on() -> None:
    memory = SuffixMemory(50_000)
    for text in drawn(1, 1500, 99):
        memory.add([text])
        assert len(memory) <= 50_000
    assert texts_of(settled(memory)) == drawn(1, 1500, 99)[-len(texts_of(memory)) :]
    assert len(memory) > 40_000


def test_of_a_conversation_each_turn_is_remembered_once() -> None:
    memory, other = SuffixMemory(remember="all"), SuffixMemory(remember="all")
    turns = drawn(6, 20, 150)
    for memory_, order in ((memory, range(10)), (other, [0, 0, 1, 1, 2])):
        for turn in order:
            spoken = [token for part in turns[:turn] for token in part]
            memory_.remember([[*spoken, *turns[turn][:50]]], [turns[turn][50:]])
    assert len(memory) == 1500 + 9 * LONGEST_MATCH + 10, "a turn begins with what a match before it needs"
    assert len(other) == 450 + 2 * LONGEST_MATCH + 3, "nor is the same call"
    assert texts_of(other)[1] == [*turns[0][-LONGEST_MATCH:], *turns[1]]
    for turn in range(9):
        end = [*turns[turn][-LONGEST_MATCH:], *turns[turn + 1][:2]]
        assert proposed(memory, end)[0] == (turns[turn + 1][2], -1)


def test_what_was_forgotten_of_a_conversation_is_remembered_anew() -> None:
    memory, (first, second) = SuffixMemory(remember="all"), drawn(7, 2, 100)
    memory.remember([first[:50]], [first[50:]])
    memory.advance(keep=0)
    memory.remember([[*first, *second[:50]]], [second[50:]])
    assert texts_of(memory) == [[*first, *second]]
    memory.clear()
    memory.remember([first], [second])
    assert texts_of(memory) == [[*first, *second]]


@given(
    ages=st.lists(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), max_size=4), max_size=12),
    keep=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_only_the_newest_ages_are_remembered(ages: list[list[list[int]]], keep: int) -> None:
    memory = SuffixMemory()
    for number, texts in enumerate(ages, start=1):
        memory.add(texts)
        memory.advance(keep)
        assert texts_of(memory) == [text for age in ages[max(number - keep, 0) : number] for text in age]


def test_ages_are_counted() -> None:
    for wrong in (-1, True, 1.5, None):
        with pytest.raises(ValueError, match="`keep` must be an integer of at least 0"):
            SuffixMemory().advance(wrong)  # type: ignore[arg-type]


def test_a_cleared_memory_proposes_nothing_even_while_it_merges() -> None:
    memory = SuffixMemory()
    for text in drawn(2, 300, 400):
        memory.add([text])
    memory.clear()
    assert len(settled(memory)) == 0 and proposed(memory, drawn(2, 1, 30)[0]) == []


def test_threads_add_and_search_at_once() -> None:
    memory, texts = SuffixMemory(60_000), drawn(3, 400, 100)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for text in texts[first::4]:
                memory.add([text])
                assert len(memory) <= 60_000
                assert proposed(memory, text[:50])[0] == (text[50], -1)
        except (AssertionError, LookupError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(texts_of(settled(memory))) == sorted(texts)


def test_a_saved_memory_comes_back_and_proposes_the_same(tmp_path: Path) -> None:
    memory, file = SuffixMemory(5000, "all"), tmp_path / "memory.safetensors"
    memory.add(drawn(4, 40, 100, 19))
    memory.save(file, letter_tokenizer())
    loaded = SuffixMemory.load(file, letter_tokenizer())
    assert texts_of(loaded) == texts_of(memory) and repr(loaded) == repr(memory)
    for end in drawn(5, 10, 20, 19):
        assert proposed(loaded, end, 16) == proposed(memory, end, 16)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "for its owner alone"
    assert SuffixMemory.is_saved_in(file)
    loaded.remember([[1, 2]], [[3]])
    assert texts_of(loaded)[-1] == [1, 2, 3]


def test_what_is_saved_while_others_add_is_what_was_there(tmp_path: Path) -> None:
    memory, file, texts = SuffixMemory(), tmp_path / "memory", drawn(8, 300, 60, 19)
    adding = threading.Thread(target=lambda: [memory.add([text]) for text in texts])
    adding.start()
    while True:
        is_last = not adding.is_alive()
        memory.save(file, letter_tokenizer())
        found = texts_of(SuffixMemory.load(file, letter_tokenizer()))
        assert found == texts[: len(found)]
        if is_last:
            break
    assert found == texts


def test_an_empty_memory_comes_back_empty(tmp_path: Path) -> None:
    SuffixMemory().save(tmp_path / "memory", letter_tokenizer())
    assert len(SuffixMemory.load(tmp_path / "memory", letter_tokenizer())) == 0


def test_files_that_are_not_its_own_are_refused_by_name(tmp_path: Path) -> None:
    memory, file = SuffixMemory(), tmp_path / "texts.safetensors"
    memory.add([[1, 2, 3]])
    memory.save(file, letter_tokenizer())
    other = letter_tokenizer()
    other.add_tokens(["xyz"])
    with pytest.raises(ValueError, match=r"texts.safetensors holds tokens of .*Load it with its own tokenizer"):
        SuffixMemory.load(file, other)
    tensors = load_file(file)
    data = file.read_bytes()
    for damaged in (data[:-5], data[:20], b"", b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"texts.safetensors is no memory, or was cut off"):
            SuffixMemory.load(file, letter_tokenizer())
        assert not SuffixMemory.is_saved_in(file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is no memory"):
        SuffixMemory.load(file, letter_tokenizer())
    with pytest.raises(FileNotFoundError):
        SuffixMemory.load(tmp_path / "none", letter_tokenizer())


def test_ids_beyond_the_tokenizer_are_refused(tmp_path: Path) -> None:
    memory = SuffixMemory()
    memory.add([[1, 5000]])
    memory.save(tmp_path / "memory", letter_tokenizer())
    with pytest.raises(ValueError, match="holds the token 5000, but its tokenizer knows"):
        SuffixMemory.load(tmp_path / "memory", letter_tokenizer())


@pytest.mark.parametrize("wrong", ["text", ["text"], [[-1]], [[2**31]], [[1.5]], [1, 2], [None]], ids=str)
def test_what_is_no_token_is_refused(wrong: Any) -> None:
    memory = SuffixMemory()
    with pytest.raises(ValueError, match="lists of token ids from 0 to 2147483647"):
        memory.add(wrong)
    assert len(memory) == 0


def test_arguments_are_checked() -> None:
    for wrong in (0, -1, True, 1.5, "many"):
        with pytest.raises(ValueError, match="`max_tokens` must be a positive integer"):
            SuffixMemory(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'answers' or 'all'"):
        SuffixMemory(remember="prompts")  # type: ignore[arg-type]


def test_it_drafts_for_one_vocabulary() -> None:
    memory, target = SuffixMemory(), Architecture("llama").build("sdpa")
    memory.add([[1, target.config.vocab_size]])
    with pytest.raises(ValueError, match="A text has the token"):
        memory.prepare(target)
    memory.clear()
    memory.add(torch.tensor([[1, 2], [3, 4]]))
    memory.prepare(target)
    with pytest.raises(ValueError, match="A text has the token"):
        memory.add([[target.config.vocab_size]])
    with pytest.raises(ValueError, match="Keep one memory for each tokenizer"):
        memory.prepare(Architecture("llama", {"vocab_size": target.config.vocab_size + 1}).build("sdpa"))


def test_it_tells_no_text_and_is_never_pickled() -> None:
    memory = SuffixMemory()
    memory.add([[123, 456]])
    assert repr(memory) == "SuffixMemory(3 of 1000000 tokens)" and memory
    assert "123" not in str(memory.identity()) + memory.fingerprint()
    assert copy.deepcopy(memory) is memory
    with pytest.raises(TypeError, match="Write it with `save`"):
        pickle.dumps(memory)


def test_a_process_that_dies_while_it_saves_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    memory = SuffixMemory()
    memory.add([[1, 2, 3]])
    memory.save(file, letter_tokenizer())
    process = os.fork()
    if not process:
        try:
            os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
            memory.add([[4, 5, 6]] * 1000)
            memory.save(file, letter_tokenizer())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert texts_of(SuffixMemory.load(file, letter_tokenizer())) == [[1, 2, 3]]
    (left,) = tmp_path.glob(".memory.*.unfinished")
    assert stat.S_IMODE(left.stat().st_mode) == 0o600, "for its owner alone"
    memory.save(file, letter_tokenizer())
    assert left.exists(), "another process may be writing it"
    os.utime(left, (0, 0))
    memory.save(file, letter_tokenizer())
    assert os.listdir(tmp_path) == ["memory"]


def test_an_error_while_saving_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = tmp_path / "memory", SuffixMemory()
    memory.save(file, letter_tokenizer())
    before = file.read_bytes()
    memory.add([[1, 2, 3]])

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        memory.save(file, letter_tokenizer())
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["memory"]
