"""The sequences that a call writes, and which of its rows are still decoded.

A token is committed with exactly the calls of plain decoding. Rows in lockstep share one `Text`. Rows of a ragged
batch have one each, so that none waits for the others.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ..tree import DraftTree
from .processors import TreeLogitsProcessor


_PATIENCE = 4.0  # a row that lags by so many tokens weighs e times as much


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a text ends, and when a criterion logs a warning."""

    token_ids: frozenset[int]  # any of these ends it
    length: int  # positions that it may reach
    warning_free_length: int  # positions above which Transformers warns

    def are_silent(self, length: int) -> bool:
        """Whether no criterion warns before a text ends or reaches `length` positions."""
        return self.warning_free_length == self.length or length <= self.warning_free_length

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "StopConditions | None":
        """Read the criteria; `None` if anything but end tokens and a length may stop a text."""
        lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        tokens = [one for one in criteria if type(one) is EosTokenCriteria]
        if not lengths or len(lengths) + len(tokens) < len(criteria):
            return None
        token_ids = frozenset(token for one in tokens for token in one.eos_token_id.flatten().tolist())
        length = min(one.max_length for one in lengths)
        silent = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
        return cls(token_ids, length, min([length, *silent]))


class Text:
    """Sequences that advance together, one committed position at a time.

    Args:
        input_ids: `[b, s]` the prompt.
        logits_processor: called once per committed position, never for a rejected node.
        stopping_criteria: called after each committed position.
        do_sample: draw from the processed scores, else take the largest.
        pad_token: fills finished rows, where an end token is among the criteria.
        streamer: gets each committed token.
        keep_scores: keep the processed scores of each position.
        keep_logits: keep the raw logits of each position.
        keep_padding: decode the padding of finished rows too, so that a caller's cache holds it as in plain decoding.
        stops_at_ends: end a step where a row ends, so that the cache holds that row up to its end.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        *,
        do_sample: bool,
        pad_token: Tensor | None,
        streamer: Any = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        keep_padding: bool = False,
        stops_at_ends: bool = False,
    ) -> None:
        self._ids = input_ids  # without the tokens of `_ahead`
        self._ahead: list[Tensor] = []  # [any] each, of a single row
        self.length = int(input_ids.shape[1])
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.finished = False
        self.pad_token = pad_token
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        self._logits_processor = logits_processor
        self._stopping_criteria = stopping_criteria
        self.do_sample = do_sample
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._streamer = streamer
        self._keep_padding, self.stops_at_ends = keep_padding, stops_at_ends
        self._is_watched = streamer is not None or keep_scores or keep_logits
        self.stop_conditions = StopConditions.of(stopping_criteria) if len(input_ids) == 1 else None
        is_supported = TreeLogitsProcessor.supports(logits_processor)
        self._tree_processor = TreeLogitsProcessor(logits_processor) if is_supported else None
        self._decoded: Tensor | None = None  # rows that are still decoded; None for all

    def __len__(self) -> int:
        """Rows of the call."""
        return len(self._ids)

    @property
    def input_ids(self) -> Tensor:
        """`[b, s]` prompt and answer, joined on access."""
        if self._ahead:
            ahead = torch.cat(self._ahead).to(self._ids.device)
            self._ids, self._ahead = torch.cat([self._ids, ahead[None]], dim=1), []
        return self._ids

    @property
    def decoded_count(self) -> int:
        return len(self if self._decoded is None else self._decoded)

    @property
    def live(self) -> Tensor:
        """`[b]` bool: whether decoded rows count. Finished ones do if nothing pads them, or their padding is kept."""
        rows = self._of_decoded(self.unfinished)
        return rows.bool() if self._pads and not self._keep_padding else torch.ones_like(rows, dtype=torch.bool)

    @property
    def ended(self) -> dict[int, int]:
        """Rows that have ended but are still decoded: row -> place among the decoded ones."""
        rows = range(len(self)) if self._decoded is None else self._decoded.tolist()
        places = [place for place, goes_on in enumerate(self.live.tolist()) if not goes_on]
        return {rows[place]: place for place in places}

    @property
    def newest(self) -> Tensor:
        """`[b]` the last token of each decoded row."""
        return self._of_decoded(self.input_ids[:, -1])

    def _of_decoded(self, values: Tensor) -> Tensor:
        return values if self._decoded is None else values[self._decoded]

    def drop_finished(self) -> list[int] | None:
        """Stop decoding finished rows; return the places of the others, or `None` if none has finished."""
        going_on = self.live.tolist()
        if all(going_on):
            return None
        kept = [place for place, goes_on in enumerate(going_on) if goes_on]
        rows = torch.arange(len(self), device=self._ids.device)
        self._decoded = self._of_decoded(rows)[kept]
        return kept

    def is_plain_greedy(self, count: int) -> bool:
        """Whether the next `count` tokens, until `ends_with`, are the largest logits, and nothing observes them."""
        return self.picks_by_scores(count) and not self.do_sample and not self._logits_processor

    def picks_by_scores(self, count: int) -> bool:
        """Whether `pick` gives the next `count` tokens, until `ends_with`, without reading the text."""
        processor = self._tree_processor
        reads_scores = processor is not None and not processor.reads_texts
        return self._ends_silently(count) and reads_scores and not self._is_watched

    def can_process_at_once(self, tree: DraftTree) -> bool:
        """Whether the processors can run on all nodes before the path is known: stateless, on the tree's device."""
        is_here = tree.tokens.device == self._ids.device
        return is_here and self._ends_silently(tree.node_count) and self._tree_processor is not None

    def ends_with(self, token: int, count: int) -> bool:
        """Whether the text ends with `token`, the last of `count` picks that are not appended yet."""
        conditions = self.stop_conditions
        assert conditions is not None
        return token in conditions.token_ids or self.length + count >= conditions.length

    def _ends_silently(self, count: int) -> bool:
        conditions = self.stop_conditions
        return conditions is not None and conditions.are_silent(self.length + count)

    def process(self, tree: DraftTree, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits `[1, n or more, v]` of one row's tree raw and processed, `[n, v]` each."""
        assert self._tree_processor is not None
        raw = logits[0, : tree.node_count].to(dtype=torch.float32, device=self._ids.device)
        read = self.input_ids if self._tree_processor.reads_texts else self._ids  # avoids joining the text
        return raw, self._tree_processor(read, raw, tree)

    def keep_outputs(self, path: list[int], logits: Tensor, scores: Tensor) -> None:
        """Keep the raw logits and processed scores `[n, v]` of `path` if the caller asked for them."""
        if self.scores is not None:
            self.scores += tuple(scores[node : node + 1].clone() for node in path)
        if self.logits is not None:
            self.logits += tuple(logits[node : node + 1].clone() for node in path)

    def append(self, tokens: list[int], there: Tensor, *, finished: bool) -> None:
        """Append tokens to this one row at once; `there` `[t]` holds them on the target's device."""
        self.length += len(tokens)
        self._ahead.append(there)
        if finished:
            self.unfinished, self.finished = torch.zeros_like(self.unfinished), True
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))

    def pick(self, logits: Tensor) -> Tensor:
        """Pick tokens `[any]` from logits `[any, v]` of any texts with these settings; see `picks_by_scores`."""
        scores = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        return self._picked(self._logits_processor(cast(torch.LongTensor, self._ids), cast(Any, scores)))

    def _picked(self, scores: Tensor) -> Tensor:
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def commit(self, logits: Tensor) -> Tensor:
        """Pick, append and return one token per decoded row, `[b]`, from the target's logits `[b, v]`."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        if self._decoded is not None:  # a draw takes as many random numbers as in plain decoding
            every_row = logits.new_zeros(len(self), logits.shape[-1])
            logits = every_row.index_copy_(0, self._decoded, logits)
        scores: Tensor = self._logits_processor(cast(torch.LongTensor, self.input_ids), cast(Any, logits))
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        tokens = self._picked(scores)
        if self._pads:
            assert self.pad_token is not None
            tokens = tokens * self.unfinished + self.pad_token * (1 - self.unfinished)
        self._ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        self.length += 1
        self.unfinished = self.unfinished & ~self._stopping_criteria(self.input_ids, self.scores)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        self.finished = bool(self.unfinished.max() == 0)
        return self._of_decoded(tokens)


class Batch:
    """All rows of a call: one text with all rows in lockstep, or one text for each row."""

    def __init__(self, texts: list[Text], *, drops_finished: bool) -> None:
        self._texts = texts
        self._decoded = list(range(len(texts)))  # indices of texts that are still decoded
        self._drops_finished = drops_finished  # leave finished rows out of all further work

    def __len__(self) -> int:
        """Rows of the call."""
        return sum(map(len, self._texts))

    @property
    def in_lockstep(self) -> bool:
        """Whether all rows advance together, as one row does."""
        return len(self._texts) == 1

    @property
    def finished(self) -> bool:
        return all(self._texts[index].finished for index in self._decoded)

    @property
    def newest(self) -> Tensor:
        """`[b]` the last token of every decoded row."""
        if self.in_lockstep:
            return self._texts[0].newest
        return torch.cat([text.newest for text in self.decoded_texts])

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
        """Weight of a token of each decoded row, 1.0 on average.

        The derivative of the rows' soft minimum, since the batch ends with its slowest row.
        """
        if self.in_lockstep:
            return [1.0] * self._texts[0].decoded_count
        lengths, shortest = [self._texts[index].length for index in self._decoded], self.shortest
        weights = [math.exp((shortest - length) / _PATIENCE) for length in lengths]
        total = sum(weights)
        return [weight * len(weights) / total for weight in weights]

    @property
    def decoded_texts(self) -> list[Text]:
        return [self._texts[index] for index in self._decoded]

    def is_plain_greedy(self, count: int) -> bool:
        """See `Text.is_plain_greedy`, for every decoded text."""
        return all(text.is_plain_greedy(count) for text in self.decoded_texts)

    def picks_by_scores(self, count: int) -> bool:
        """See `Text.picks_by_scores`, for every decoded text."""
        return all(text.picks_by_scores(count) for text in self.decoded_texts)

    def of_all_rows(self, counts: list[int]) -> list[int]:
        """Spread counts of decoded rows over all rows of the call, with 0 for the others."""
        every_row = [0] * len(self._texts)
        for index, count in zip(self._decoded, counts, strict=True):
            every_row[index] = count
        return every_row

    def drop_finished(self) -> list[int] | None:
        """See `Text.drop_finished`."""
        if not self._drops_finished or self.finished:
            return None
        if self.in_lockstep:
            return self._texts[0].drop_finished()
        kept = [place for place, index in enumerate(self._decoded) if not self._texts[index].finished]
        if len(kept) == len(self._decoded):
            return None
        self._decoded = [self._decoded[place] for place in kept]
        return kept

    @property
    def ended(self) -> dict[int, int]:
        """Rows that have ended but are still decoded: row -> place among the decoded ones."""
        if self.in_lockstep:
            return self._texts[0].ended
        return {row: place for place, row in enumerate(self._decoded) if self._texts[row].finished}

    def answers(self, start: int) -> list[list[int]]:
        """Return the tokens of all rows from position `start` on, padded after their ends."""
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
        """The kept processed scores `[b, v]` of each position; rows in lockstep only."""
        return self._texts[0].scores

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """The kept raw logits `[b, v]` of each position; rows in lockstep only."""
        return self._texts[0].logits

    @staticmethod
    def _padded(text: Text, length: int) -> Tensor:
        missing = length - text.length
        if not missing:
            return text.input_ids
        assert text.pad_token is not None
        return torch.cat([text.input_ids, text.pad_token.expand(1, missing)], dim=1)
