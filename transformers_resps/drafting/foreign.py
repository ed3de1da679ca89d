"""Wraps any `CandidateGenerator` of Transformers as a draft source that proposes a chain of tokens."""

from contextlib import AbstractContextManager
from itertools import accumulate, takewhile
from operator import eq, mul
from threading import Lock
from types import TracebackType
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..tree import Branches, CandidatePool, TreeShape, followed
from .continuations import TrackRecord, length_class
from .drafter import Committed, Drafter, DraftRequest
from .source import DraftCall, DraftSource


_LONGEST_CHAIN = 24  # Maximum number of a generator's candidates that are used.
_FIRST_RATE = 0.6  # Acceptance rate that is assumed before any outcome is recorded.


class ForeignSource(DraftSource):
    """Drafts for one text at a time with a `CandidateGenerator`. Holds only a weak reference to the generator."""

    calls_generate = True

    def __init__(self, generator: CandidateGenerator) -> None:
        self._generator, self._name = ref(generator), type(generator).__name__
        self._record = TrackRecord([_FIRST_RATE] * (1 + length_class(_LONGEST_CHAIN)))
        self._lock = Lock()

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(11, 10, 1)

    def prepare(self, target: PreTrainedModel) -> None:
        generator = self._generator()
        if generator is not None and generator.requires_model_outputs:
            raise ValueError(
                f"{self._name} reads outputs of Transformers' own forwards, which no tree has. Pass the model that it "
                "drafts with as `assistant_model`."
            )

    def identity(self) -> dict[str, Any]:
        return {"name_or_path": self._name}

    def drafter(self, call: DraftCall) -> "ForeignDrafter":
        generator = self._generator()
        if generator is None:
            raise ReferenceError(f"The {self._name} has been deleted. Keep it, and pass it again.")
        if call.rows > 1:
            raise ValueError(
                f"{self._name} drafts for one text, as in Transformers, and the call has {call.rows}. Pass one prompt."
            )
        if not self._lock.acquire(blocking=False):
            raise ValueError(f"This {self._name} drafts for another call now. Make one for each call.")
        call.ends.callback(self._lock.release)
        vocabulary: int = call.target.config.get_text_config(decoder=True).vocab_size
        return ForeignDrafter(generator, self._record, vocabulary)


class ForeignDrafter(Drafter):
    """Drafts for one text the chain of tokens that a `CandidateGenerator` of Transformers proposes. `record`
    tracks how often its tokens were right, by their position in the chain.
    """

    reads_text = True
    proposable_tokens = 1
    most_levels = _LONGEST_CHAIN

    def __init__(self, generator: CandidateGenerator, record: TrackRecord, vocabulary: int) -> None:
        self._generator, self._record, self._vocabulary = generator, record, vocabulary
        self._chain: list[int] = []  # the newest one, until it is judged; it follows `_text`
        self._text = torch.empty(1, 0)

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """Call the generator, and return the first `request.shape.depth` of its tokens as a chain on the host."""
        with _Named(self._generator, "drafted"):
            candidates, _ = self._generator.get_candidates(cast(torch.LongTensor, input_ids))
        self._text, self._chain = input_ids, self._checked(input_ids, candidates)[: request.shape.depth]
        rates = [self._record.rate(length_class(place)) for place in range(1, len(self._chain) + 1)]
        chain = Branches(self._chain, range(-1, len(self._chain) - 1), list(accumulate(rates, mul)))
        pool = CandidatePool.from_branches([chain])
        return pool if self._chain else pool.with_an_end()

    def observe(self, committed: Committed) -> None:
        """Record which tokens of the newest chain were right, and tell the generator how many were."""
        chain, self._chain = self._chain, []
        if not chain or committed.tree is None or committed.logits is None:
            return
        gained = committed.tokens[0].tolist() if committed.rows is None else committed.rows[0]
        right = list(map(eq, chain, gained))
        matches = sum(takewhile(bool, right))
        for place, is_right in enumerate(right[: matches + 1], start=1):
            self._record.add(length_class(place), is_right)
        nodes = followed(committed.tree.tokens[0].tolist(), committed.tree.parents[0].tolist(), chain, 0)
        with _Named(self._generator, "was told of its matches"):
            text: Any = torch.cat([self._text, self._text.new_tensor([gained])], dim=1)
            scores: Any = committed.logits[:, [0, *nodes]].float()
            self._generator.update_candidate_strategy(text, scores, min(matches, len(nodes)))

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing, since there is only one row."""

    def _checked(self, input_ids: Tensor, candidates: Any) -> list[int]:
        """Return the tokens after the text in the generator's result; raise a `ValueError` if it is malformed."""
        name, length = type(self._generator).__name__, input_ids.shape[1]
        if not isinstance(candidates, Tensor) or candidates.dim() != 2 or len(candidates) != 1:
            got = f"a tensor {list(candidates.shape)}" if isinstance(candidates, Tensor) else repr(candidates)
            raise ValueError(
                f"{name} returned {got} for one text. Return its tokens and the candidates, `[1, s + c]`."
            )
        if not torch.equal(candidates[:, :length].to(input_ids.device), input_ids):
            raise ValueError(f"{name} returned another text than it was given. Return that, and candidates after it.")
        chain: list[int] = candidates[0, length : length + _LONGEST_CHAIN].tolist()
        odd = [token for token in chain if not 0 <= token < self._vocabulary]
        if odd:
            raise ValueError(f"{name} returned the token {odd[0]}, but the target knows 0 to {self._vocabulary - 1}.")
        return chain


class _Named(AbstractContextManager[Any]):
    """Adds the generator's name, and `what` it did, to the message of an error raised inside the `with` block."""

    def __init__(self, generator: CandidateGenerator, what: str) -> None:
        self._told = f"{type(generator).__name__} failed when it {what}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raise RuntimeError(f"{self._told}: {type(error).__name__}: {error}") from error
