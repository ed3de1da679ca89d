"""The texts of one call, and which rows are still decoded.

Rows in lockstep share one `Text`, as in plain decoding. Rows of a ragged batch have one each: every row accepts and
stops like a single prompt, so a row that accepts much does not wait for the others.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..tree import DraftTree
from .acceptance import Acceptance, Picks, accept, accept_picks
from .text import Text


_PATIENCE = 4.0  # tokens: a row that lags so far counts e times as much


class Batch:
    """All rows of a call.

    Args:
        texts: one of all rows in lockstep, or one for each row on its own.
        drops_finished: leave finished rows out of all further work.
    """

    def __init__(self, texts: list[Text], *, drops_finished: bool) -> None:
        self._texts = texts
        self._decoded = list(range(len(texts)))  # texts with rows that are still decoded
        self.drops_finished = drops_finished

    def __len__(self) -> int:
        """Rows of the call."""
        return sum(map(len, self._texts))

    @property
    def in_lockstep(self) -> bool:
        return len(self._texts) == 1

    @property
    def finished(self) -> bool:
        return all(self._texts[index].finished for index in self._decoded)

    @property
    def newest(self) -> Tensor:
        """`[b]` the last token of every decoded row."""
        if self.in_lockstep:
            return self._texts[0].newest
        return torch.cat([text.newest for text in self._decoded_texts])

    @property
    def length(self) -> int:
        """Positions of the longest decoded row."""
        return max(self._texts[index].length for index in self._decoded)

    @property
    def shortest(self) -> int:
        """Positions of the shortest decoded row."""
        return min(self._texts[index].length for index in self._decoded)

    @property
    def row_weights(self) -> list[float]:
        """Weight of one token of each decoded row, 1.0 on average: the batch ends with its slowest row.

        The derivative of the rows' soft minimum; the same for all in lockstep.
        """
        if self.in_lockstep:
            return [1.0] * self._texts[0].decoded_count
        lengths, shortest = [self._texts[index].length for index in self._decoded], self.shortest
        weights = [math.exp((shortest - length) / _PATIENCE) for length in lengths]
        total = sum(weights)
        return [weight * len(weights) / total for weight in weights]

    def since(self, starts: list[int]) -> list[list[int]]:
        """The tokens of each decoded row from its position in `starts` on."""
        if self.in_lockstep:
            return self._texts[0].since(starts[0])
        texts = (self._texts[index] for index in self._decoded)
        return [text.since(start)[0] for text, start in zip(texts, starts, strict=True)]

    def read_picks(self, tree: DraftTree, logits: Tensor) -> Picks | None:
        """All that `accept` needs to know of the target, in one read that waits for it; `None` where it asks for one
        pick after the other. `logits` is `[b, n, v]`.
        """
        texts = self._decoded_texts
        if self._is_plain_greedy(tree):
            return None if logits.device.type == "cpu" else Picks.read(tree, logits)
        if len(texts) == 1 and texts[0].picks_at_once(tree, logits):
            return Picks.read(tree, logits, texts[0].tree_picks(tree, logits))
        return None

    def accept(self, tree: DraftTree, logits: Tensor, picks: Picks | None) -> Acceptance:
        """Commit what the target picks along the tree, of every decoded row; `picks` are those of `read_picks`."""
        texts = self._decoded_texts
        if picks is None and self._is_plain_greedy(tree):
            picks = Picks.asked(tree, logits)
        if picks is not None:
            acceptance = accept_picks(picks, texts)
        elif self.in_lockstep:
            return accept(tree, logits, texts[0])
        else:
            parts = [accept(tree.row(row), logits[row : row + 1], text) for row, text in enumerate(texts)]
            rows = [part.paths[0] for part in parts], [part.picks[0] for part in parts]
            acceptance = Acceptance.from_rows(*rows, [], logits.device)
        emitted = [0] * len(self._texts)
        for index, count in zip(self._decoded, acceptance.counts, strict=True):
            emitted[index] = count
        return replace(acceptance, emitted=emitted)

    @property
    def _decoded_texts(self) -> list[Text]:
        return [self._texts[index] for index in self._decoded]

    def _is_plain_greedy(self, tree: DraftTree) -> bool:
        return all(text.is_plain_greedy(tree.node_count) for text in self._decoded_texts)

    def drop_finished(self) -> list[int] | None:
        """Stop decoding finished rows.

        Returns:
            Of the rows decoded so far, those that go on; `None` when all do.
        """
        if not self.drops_finished or self.finished:
            return None
        if self.in_lockstep:
            return self._texts[0].drop_finished()
        kept = [place for place, index in enumerate(self._decoded) if not self._texts[index].finished]
        if len(kept) == len(self._decoded):
            return None
        self._decoded = [self._decoded[place] for place in kept]
        return kept

    def answers(self, start: int) -> list[list[int]]:
        """What all rows hold from position `start` on, padded after their ends."""
        if len(self) == 1:
            return self.since([start])
        found: list[list[int]] = self.input_ids[:, start:].tolist()
        return found

    @property
    def input_ids(self) -> Tensor:
        """`[b, s]` prompts and answers, padded after their ends."""
        if self.in_lockstep:
            return self._texts[0].input_ids
        longest = max(text.length for text in self._texts)
        return torch.cat([self._padded(text, longest) for text in self._texts])

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """The processed scores `[b, v]` of each position, where they were kept; rows in lockstep only."""
        return self._texts[0].scores

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """The raw logits `[b, v]` of each position, where they were kept; rows in lockstep only."""
        return self._texts[0].logits

    @staticmethod
    def _padded(text: Text, length: int) -> Tensor:
        missing = length - text.length
        if not missing:
            return text.input_ids
        assert text.pad_token is not None
        return torch.cat([text.input_ids, text.pad_token.expand(1, missing)], dim=1)
