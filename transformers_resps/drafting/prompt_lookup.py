"""Prompt lookup: draft the tokens that followed earlier occurrences of the text's last tokens, also in other texts.

The index of the text grows with the text and is never rebuilt. A query takes microseconds.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tree import LOOKED_UP, Branches, CandidatePool
from ..verifying.rows import leading_pads
from .continuations import LONGEST_DRAFT, Continuations, Corpus, match_record
from .drafter import Committed, Drafter, DraftRequest
from .source import DraftCall
from .suffixes import Suffixes


if TYPE_CHECKING:  # it imports this module
    from .suffix_memory import SuffixMemory


_SEEN_NODES = 16  # Maximum number of nodes whose odds are passed to a policy.
_STRIDE = 3  # Outcomes are recorded at every third position of the text.


class Lookup:
    """Proposes continuations of one text, and records how often they are right, even if no step uses them.

    Searches this text, and those of `memories`, for the text's last tokens. Never proposes the tokens `never_drafted`,
    such as placeholders of an image, nor tokens after them. Without `branches` the continuations are a chain.
    """

    def __init__(
        self,
        never_drafted: frozenset[int] = frozenset(),
        memories: "Sequence[SuffixMemory]" = (),
        *,
        branches: bool = True,
    ) -> None:
        self._never_drafted, self._memories, self._branches = never_drafted, memories, branches
        self._text = Suffixes()
        self._own = Corpus([self._text], match_record(), LOOKED_UP)
        self._found: Continuations | None = None
        self._judged: tuple[int, Continuations] | None = None  # position to record next, and proposals found there

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens, and record whether the continuations found before them were right.

        Outcomes are recorded at every third position of the text, so they do not depend on the number of tokens in
        each step. At the prompt nothing is recorded, since the target did not generate it.
        """
        if self._found is not None:
            self._found.judge_sum(tokens)
            self._found.judge_beside(tokens)
        start = 0
        if self._judged is not None:
            while (end := self._judged[0] + _STRIDE - len(self) + start) <= len(tokens):
                self._append(tokens[start:end])
                place, continuations = self._judged
                continuations.judge(self._text.tokens[place:])
                self._judged, start = (len(self), self.found), end
        self._append(tokens[start:])
        if self._judged is None:
            self._judged = len(self), self.found

    def _append(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._text.extend(tokens)
            self._found = None

    @property
    def found(self) -> Continuations:
        """Likely continuations of the text. The first use after the text has changed searches for them."""
        if self._found is None:
            corpora = [self._own, *(memory.corpus for memory in self._memories)]
            self._found = Continuations(self._text, corpora, self._never_drafted, branches=self._branches)
        return self._found

    @property
    def odds(self) -> list[float]:
        """Probabilities of the best nodes, highest first; after `weigh_beside`, without nodes of other drafters."""
        beside = self.found.odds_beside
        if beside is not None:
            return sorted(filter(None, beside), reverse=True)
        return self.found.grow(_SEEN_NODES).odds[:_SEEN_NODES]


class LookupDrafter(Drafter):
    """Drafts each row of a batch with its own `Lookup`. Observed tokens are indexed before the next proposal.

    `pads` counts the padding tokens before each row's prompt. `origins` are tokens put before each row's text for
    searching, such as an encoder's input; `None` for none. Other arguments are as in `Lookup`.
    """

    proposable_tokens = 1
    most_levels = LONGEST_DRAFT

    def __init__(
        self,
        pads: list[int],
        *,
        origins: list[list[int]] | None = None,
        never_drafted: frozenset[int] = frozenset(),
        memories: "Sequence[SuffixMemory]" = (),
        branches: bool = True,
    ) -> None:
        self._lookups = [Lookup(never_drafted, memories, branches=branches) for _ in pads]
        self._pads = pads
        self._origins = [[] for _ in pads] if origins is None else origins
        self._unread: list[Tensor | Sequence[Sequence[int]]] = []

    @classmethod
    def of_call(cls, call: DraftCall, memories: "Sequence[SuffixMemory]" = ()) -> "LookupDrafter":
        """Make the drafter of one call, which also searches the texts of `memories`."""
        return cls(
            [0] * call.rows if call.text_mask is None else leading_pads(call.text_mask),
            origins=call.origins,
            never_drafted=call.never_drafted,
            memories=memories,
            branches=not call.target.config.is_encoder_decoder,  # encoder-decoders verify only chains
        )

    def observe(self, committed: Committed) -> None:
        self._unread.append(committed.tokens if committed.rows is None else committed.rows)

    def read(self, at_least: int = 1) -> None:
        for part in self._unread:
            found: Sequence[Sequence[int]] = part.tolist() if isinstance(part, Tensor) else part
            rows = zip(self._lookups, self._pads, self._origins, found, strict=True)
            for lookup, pads, origin, tokens in rows:
                lookup.extend(tokens if len(lookup) else [*origin, *tokens[pads:]])
        self._unread.clear()

    @property
    def odds(self) -> list[list[float]]:
        """Probabilities of each row's best nodes, see `Lookup.odds`."""
        self.read()
        return [lookup.odds for lookup in self._lookups]

    def weigh_beside(self, pool: CandidatePool, most: int) -> CandidatePool:
        """Compare the `most` best nodes of each row with another drafter's pool, which must be on the host.

        Returns `pool`, in which each node that the lookup also found has the higher of its two scores.
        """
        self.read()
        scores = pool.scores.tolist()
        rows = zip(self._lookups, pool.tokens.tolist(), pool.parents.tolist(), scores, strict=True)
        for lookup, tokens, parents, own in rows:
            lookup.found.grow(most).weigh_beside(tokens, parents, most)
            for node, odds in lookup.found.shared.items():
                own[node] = max(own[node], log(odds))
        return replace(pool, scores=torch.tensor(scores))

    @property
    def shared(self) -> list[list[int]]:
        """For each row, indices of the other drafter's nodes that the lookup also found; set by `weigh_beside`."""
        return [list(lookup.found.shared) for lookup in self._lookups]

    def branches(self, request: DraftRequest) -> list[Branches]:
        """Return the best nodes found for each row, at most `request.shape.lookup`."""
        self.read()
        return [lookup.found.branches(request.shape.lookup, request.least_prob) for lookup in self._lookups]

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        return CandidatePool.from_branches(self.branches(request))

    def keep_rows(self, rows: list[int]) -> None:
        self.read()
        self._lookups = [self._lookups[row] for row in rows]
        self._pads = [self._pads[row] for row in rows]
        self._origins = [self._origins[row] for row in rows]
