"""Remembers texts of earlier calls, and drafts the tokens that follow there after the present text's last tokens."""

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from glob import escape
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock, Thread
from time import time
from typing import Any, Literal, NoReturn, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tree import REMEMBERED, TreeShape
from .continuations import Corpus, match_record
from .drafter import Drafter
from .prompt_lookup import LookupDrafter
from .source import DraftCall, DraftSource
from .suffixes import LARGEST_TOKEN, LONGEST_MATCH, SEPARATOR, Suffixes, count_shared


FORMAT = "suffix memory 1"
_METADATA = "transformers_resps"  # Key of the metadata in the safetensors file.
_KEYS = {"max_tokens", "remember", "vocab_size", "tokenizer", "name"}  # Keys of a file's metadata beside its format.
# Suffix of a file while it is written. Such a file is left by a process that died if it is older than these seconds.
_UNFINISHED, _DEAD_SECONDS = ".unfinished", 600.0
_NODES = 8  # Number of nodes of the default tree.
_LARGE = 16384  # Segments that have more tokens in total are merged in a thread.
_RATIO = 3  # A segment is merged with all newer ones if it has at most three times their tokens.
_CONVERSATIONS = 64  # Number of conversations whose next turn is recognised by its beginning.
_SLACK = 16  # A full memory forgets a sixteenth of its tokens at once.


class SuffixMemory(DraftSource):
    """Remembers the texts of calls, and drafts the tokens that follow in them after the present text's last tokens.

    It holds users' texts as token ids, in RAM and in the files that `save` writes. Anyone who can run calls with this
    memory can find out what it remembers, from drafts and their timing. Threads may share a memory.

    It holds at most `max_tokens` tokens, and forgets the oldest first. With `remember="answers"` it remembers what
    calls generate, with "all" also their prompts. Raises a `ValueError` for other values.
    """

    def __init__(self, max_tokens: int = 1_000_000, remember: Literal["answers", "all"] = "answers") -> None:
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 0 < max_tokens <= LARGEST_TOKEN:
            raise ValueError(
                f"`max_tokens` must be a positive integer, got {max_tokens!r}. Leave it out for a million."
            )
        if remember not in ("answers", "all"):
            raise ValueError(f"`remember` must be 'answers' or 'all', got {remember!r}. 'all' keeps prompts, too.")
        self._max_tokens, self._remember = max_tokens, remember
        self._segments: tuple[Suffixes, ...] = ()  # the oldest first; none of them grows
        self._record = match_record()
        self._vocab_size: int | None = None  # of the targets; `None` before the first one
        self._largest = -1  # the largest token id that was added
        self._added, self._ages = 0, list[int]()  # number of tokens ever added, now and at the end of each age
        self._conversations: list[array[int]] = []  # the remembered conversations, up to their newest turn
        self._lock = Lock()  # held to change the fields above, but not to read them or to sort texts
        self._merging = False

    def __repr__(self) -> str:
        return f"SuffixMemory({len(self)} of {self._max_tokens} tokens)"

    def __len__(self) -> int:
        """Count the remembered tokens, and one more for the end of each text."""
        return sum(map(len, self._segments))

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the memory itself: a copied model shares it."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A memory holds users' texts, so it is not pickled. Write it with `save`.")

    @property
    def corpus(self) -> Corpus:
        """The texts that are remembered now, and the record of how often their tokens were right."""
        return Corpus(self._segments, self._record, REMEMBERED)

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(1, 0, 1, lookup=_NODES)

    def identity(self) -> dict[str, Any]:
        return {"name_or_path": "suffix memory"}

    def drafter(self, call: DraftCall) -> Drafter:
        """Make a drafter for prompt lookup that also searches this memory."""
        return LookupDrafter.of_call(call, [self])

    def prepare(self, target: PreTrainedModel) -> None:
        """Raise a `ValueError` if the target's vocabulary lacks a stored token, or has another size than before."""
        vocab_size: int = target.config.get_text_config(decoder=True).vocab_size
        with self._lock:
            if self._vocab_size not in (None, vocab_size):
                raise ValueError(
                    f"The memory is of a vocabulary of {self._vocab_size} tokens, but the target knows {vocab_size}. "
                    "Keep one memory for each tokenizer."
                )
            self._check(self._largest, vocab_size)
            self._vocab_size = vocab_size

    def add(self, texts: Iterable[Sequence[int] | Tensor]) -> None:
        """Remember texts, given as token ids such as `tokenizer(texts)["input_ids"]`, the newest text last.

        Raises a `ValueError` for a string, and for a token id that is invalid or outside the targets' vocabulary.
        """
        if isinstance(texts, str):
            texts = [texts]  # `_as_tokens` raises for a string
        joined, largest = array("I"), -1
        for tokens in map(_as_tokens, texts):
            if tokens:
                joined.extend(tokens)
                joined.append(SEPARATOR)
                largest = max(largest, max(tokens))
        if not joined:
            return
        young = Suffixes(joined[-self._max_tokens :])
        with self._lock:
            self._check(largest, self._vocab_size)
            self._largest = max(self._largest, largest)
            self._segments, self._added = (*self._segments, young), self._added + len(joined)
            if len(self) > self._max_tokens:  # forget more than needed, so that it is rarely done
                self._forget(len(self) - self._max_tokens + self._max_tokens // _SLACK)
            while not self._merging and (chosen := self._to_merge()):
                if sum(map(len, chosen)) > _LARGE:
                    self._merging = True
                    Thread(target=self._merge_large, name="suffix memory", daemon=True).start()
                else:
                    self._replace(chosen, _joined(chosen))

    def remember(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """Store a call's answers; if `remember` is "all", also its prompts, without turns that are already stored."""
        if self._remember == "answers":
            self.add(answers)
            return
        for prompt, answer in zip(prompts, answers, strict=True):
            text = _as_tokens([*prompt, *answer])
            lengths = [(count_shared(text.tobytes(), one.tobytes()), one) for one in self._conversations]
            known, last = max(lengths, key=itemgetter(0), default=(0, text))
            if known < len(text):
                self.add([text[max(known - LONGEST_MATCH, 0) :]])  # begins with known tokens, so that they can match
                with self._lock:
                    others = [one for one in self._conversations if one is not last or known < len(one)]
                    self._conversations = [*others, text][-_CONVERSATIONS:]

    def advance(self, keep: int) -> None:
        """End the current age, and forget all texts except those of the `keep` newest ages, the ended one included.

        An age consists of the texts added between two calls of `advance`, for instance with the same trained weights.
        Raises a `ValueError` if `keep` is no integer, or negative.
        """
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
            raise ValueError(f"`keep` must be an integer of at least 0, got {keep!r}. It counts ages.")
        with self._lock:
            self._ages.append(self._added)
            del self._ages[: -keep - 1]
            if len(self._ages) > keep:
                self._forget(len(self) - self._added + self._ages[0])

    def clear(self) -> None:
        """Forget all texts, and the record of how often their tokens were right."""
        with self._lock:
            self._segments, self._record, self._largest = (), match_record(), -1
            self._conversations = []

    def _check(self, largest: int, vocab_size: int | None) -> None:
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"A text has the token {largest}, but the target knows 0 to {vocab_size - 1}. Add texts of the "
                "target's own tokenizer."
            )

    def _forget(self, surplus: int) -> None:
        """Drop the `surplus` oldest tokens. If this cuts a text in two, drop the rest of this text, too."""
        if surplus <= 0:
            return
        self._conversations = []  # their texts may be dropped
        kept = list(self._segments)
        while kept and len(kept[0]) <= surplus:
            surplus -= len(kept.pop(0))
        if kept and surplus > 0:
            kept[0] = kept[0].without_first(surplus)
        self._segments = tuple(kept)

    def _to_merge(self) -> tuple[Suffixes, ...]:
        """Return segments to merge: the first at most `_RATIO` times as long as all newer ones, and the newer ones."""
        segments = self._segments
        for first in range(len(segments) - 1):
            if len(segments[first]) <= _RATIO * sum(map(len, segments[first + 1 :])):
                return segments[first:]
        return ()

    def _replace(self, chosen: tuple[Suffixes, ...], merged: Suffixes) -> None:
        """Replace the chosen segments by the merged one, unless any of them was forgotten meanwhile."""
        kept = self._segments
        first = next((at for at, one in enumerate(kept) if one is chosen[0]), len(kept))
        if kept[first : first + len(chosen)] == chosen:
            self._segments = (*kept[:first], merged, *kept[first + len(chosen) :])

    def _merge_large(self) -> None:
        """Merge segments while there are some to merge. Other threads may search and add segments meanwhile."""
        while True:
            with self._lock:
                chosen = self._to_merge()
                self._merging = bool(chosen)
            if not chosen:
                return
            merged = _joined(chosen)
            with self._lock:
                self._replace(chosen, merged)

    def save(self, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Write all texts to one file that only its owner can read. It replaces an existing file atomically.

        `tokenizer` is the tokenizer of the texts; pass the same one to `load`. Raises an `OSError` if the file
        cannot be written; an existing file is then unchanged.
        """
        segments, path = self._segments, Path(path)
        told = {"format": FORMAT, "max_tokens": self._max_tokens, "remember": self._remember}
        told |= {"vocab_size": self._vocab_size, **_identity(tokenizer)}
        tokens = np.concatenate([np.array(part.tokens) for part in segments] or [np.zeros(0)]).astype(np.uint32)
        data = save({"tokens": tokens}, {_METADATA: json.dumps(told)})
        prefix = f".{path.name}."
        for left in path.parent.glob(f"{escape(prefix)}*{_UNFINISHED}"):  # left by a process that died
            with suppress(FileNotFoundError):
                if time() - left.stat().st_mtime > _DEAD_SECONDS:
                    left.unlink()
        with NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=_UNFINISHED, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            finally:  # after a success there is no such file, since it was renamed
                Path(file.name).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> Self:
        """Load a memory that `save` wrote.

        Raises a `FileNotFoundError` if the file is missing; a `ValueError` if it is no saved memory, damaged, or
        written with another tokenizer.
        """
        told = _told(path)
        if told is None:
            raise ValueError(f"{path} is no memory, or was cut off. Copy it again, or begin with an empty one.")
        identity = _identity(tokenizer)
        if told["tokenizer"] != identity["tokenizer"]:
            raise ValueError(
                f"{path} holds tokens of {told['name'] or 'a tokenizer without a name'}, but is read with "
                f"{identity['name'] or 'another'}. Load it with its own tokenizer."
            )
        memory = cls(told["max_tokens"], told["remember"])
        memory._vocab_size = told["vocab_size"]
        with safe_open(path, "np") as opened:
            tokens = opened.get_tensor("tokens")
        texts = tokens[tokens != SEPARATOR]
        largest, known = int(texts.max(initial=0)), told["vocab_size"] or len(tokenizer)
        if len(texts) and largest >= known:
            raise ValueError(
                f"{path} holds the token {largest}, but its tokenizer knows {known}. The file was changed: begin with "
                "an empty memory."
            )
        if len(texts):
            memory._largest, memory._segments = largest, (Suffixes(array("I", tokens.tobytes())),)
        return memory

    @staticmethod
    def is_saved_in(path: str | os.PathLike[str]) -> bool:
        """Whether a file is a saved memory, and therefore holds users' texts."""
        return _told(path) is not None


def _joined(segments: Sequence[Suffixes]) -> Suffixes:
    tokens = array("I")
    for one in segments:
        tokens.extend(one.tokens)
    return Suffixes(tokens)


def _as_tokens(text: Any) -> "array[int]":
    tokens = text.flatten().tolist() if isinstance(text, Tensor) else text
    try:
        found = array("I", tokens) if not isinstance(tokens, str) else None
    except (TypeError, OverflowError):
        found = None
    if found is None or max(found, default=0) > LARGEST_TOKEN:
        raise ValueError(
            "A memory takes texts as lists of token ids from 0 to 2147483647, got something else. Pass "
            '`tokenizer(texts)["input_ids"]`.'
        )
    return found


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {"tokenizer": sha256(vocabulary.encode()).hexdigest(), "name": str(tokenizer.name_or_path)}


def _told(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the metadata of a memory's file, or `None` if the file is not a saved memory."""
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
        told = json.loads(metadata.get(_METADATA, "null"))
    except (SafetensorError, ValueError):
        return None
    return told if isinstance(told, dict) and told.get("format") == FORMAT and told.keys() >= _KEYS else None
