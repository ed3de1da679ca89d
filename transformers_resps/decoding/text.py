"""The token sequences of a call: `Text` appends new tokens, `Batch` tracks which rows are still decoded.

Processors, criteria and streamer are called for each token as in plain decoding. Rows in lockstep gain
equally many tokens per step and share one `Text`. Otherwise each row has its own `Text`, and none waits for another.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ..tree import DraftTree
from .processors import TreeLogitsProcessor


_PATIENCE = 4.0  # tokens by which a row must lag to weigh e times as much


@dataclass(frozen=True, slots=True)
class StopConditions:
    """The end tokens and the maximum length of a text, and the length above which Transformers logs a warning."""

    token_ids: frozenset[int]  # end tokens
    length: int  # maximum length
    warning_free_length: int  # Transformers warns if the text gets longer than this

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "StopConditions | None":
        """Read end tokens and maximum length from `criteria`; return `None` if other criteria may end a text."""
        lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        tokens = [one for one in criteria if type(one) is EosTokenCriteria]
        if not lengths or len(lengths) + len(tokens) < len(criteria):
            return None
        token_ids = frozenset(token for one in tokens for token in one.eos_token_id.flatten().tolist())
        length = min(one.max_length for one in lengths)
        silent = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
        return cls(token_ids, length, min([length, *silent]))


class Text:
    """Appends tokens to the text of one row, or of several rows that all gain the same number of tokens per step.

    `input_ids` `[b, s]` are the prompts. `commit` calls `logits_processor` once for each appended position, never for
    a rejected node. `pad_token` is appended to finished rows, if the criteria include an end token. `keep_scores` and
    `keep_logits` store each position's processed scores and raw logits. With `keep_padding` the target also runs over
    the padding of finished rows, because plain decoding leaves it in the caller's cache. With `stops_at_ends` a step
    ends as soon as a row ends, so that the cache holds that row up to its end.
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
        self._ids = input_ids  # [b, s]; the tokens of `_ahead` follow
        self._ahead: list[Tensor] = []  # tokens [any] of a single row, not joined yet
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
        self._decoded: Tensor | None = None  # indices of the rows that are still decoded; None for all

    def __len__(self) -> int:
        """Number of rows, finished ones included."""
        return len(self._ids)

    @property
    def input_ids(self) -> Tensor:
        """Prompts and answers `[b, s]`. Reading it joins the tokens that were appended one by one."""
        if self._ahead:
            ahead = torch.cat(self._ahead).to(self._ids.device)
            self._ids, self._ahead = torch.cat([self._ids, ahead[None]], dim=1), []
        return self._ids

    @property
    def decoded_count(self) -> int:
        return len(self if self._decoded is None else self._decoded)

    @property
    def live(self) -> Tensor:
        """Bool mask `[b]` over decoded rows: false for finished rows, unless their padding must be decoded, too."""
        rows = self._of_decoded(self.unfinished)
        return rows.bool() if self._pads and not self._keep_padding else torch.ones_like(rows, dtype=torch.bool)

    @property
    def ended(self) -> dict[int, int]:
        """Finished rows that are still decoded, as a map from row to its index among the decoded rows."""
        rows = range(len(self)) if self._decoded is None else self._decoded.tolist()
        places = [place for place, goes_on in enumerate(self.live.tolist()) if not goes_on]
        return {rows[place]: place for place in places}

    @property
    def newest(self) -> Tensor:
        """The last token `[b]` of each decoded row."""
        return self._of_decoded(self.input_ids[:, -1])

    def _of_decoded(self, values: Tensor) -> Tensor:
        return values if self._decoded is None else values[self._decoded]

    def drop_finished(self) -> list[int] | None:
        """Stop decoding finished rows; return the old indices of the other rows, or `None` if no row has finished."""
        going_on = self.live.tolist()
        if all(going_on):
            return None
        kept = [place for place, goes_on in enumerate(going_on) if goes_on]
        rows = torch.arange(len(self), device=self._ids.device)
        self._decoded = self._of_decoded(rows)[kept]
        return kept

    def is_plain_greedy(self, count: int) -> bool:
        """Whether the next `count` tokens are argmaxes of raw logits, and no streamer or output needs each token."""
        return self.picks_by_scores(count) and not self.do_sample and not self._logits_processor

    def picks_by_scores(self, count: int) -> bool:
        """Whether `pick` can choose the row's next `count` tokens from logits alone, without reading the text."""
        processor = self._tree_processor
        reads_scores = processor is not None and not processor.reads_texts
        return self._ends_silently(count) and reads_scores and not self._is_watched

    def can_process_at_once(self, tree: DraftTree) -> bool:
        """Whether processors can run on all nodes at once: all are stateless, and text and tree are on one device."""
        is_here = tree.tokens.device == self._ids.device
        return is_here and self._ends_silently(tree.node_count) and self._tree_processor is not None

    def ends_with(self, token: int, count: int) -> bool:
        """Whether `token`, the last of `count` new tokens that are not appended yet, ends the text."""
        conditions = self.stop_conditions
        assert conditions is not None
        return token in conditions.token_ids or self.length + count >= conditions.length

    def _ends_silently(self, count: int) -> bool:
        """Whether Transformers logs no warning of excessive length before the text ends or gains `count` tokens."""
        conditions = self.stop_conditions
        if conditions is None:
            return False
        free = conditions.warning_free_length
        return free == conditions.length or self.length + count <= free

    def process(self, tree: DraftTree, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw and processed scores `[n, v]` of one row's tree from the first n of logits `[1, any, v]`."""
        assert self._tree_processor is not None
        raw = logits[0, : tree.node_count].to(dtype=torch.float32, device=self._ids.device)
        read = self.input_ids if self._tree_processor.reads_texts else self._ids  # avoids joining an unread text
        return raw, self._tree_processor(read, raw, tree)

    def keep_outputs(self, path: list[int], logits: Tensor, scores: Tensor) -> None:
        """Store raw logits and processed scores (`[n, v]`) at the nodes of `path`, if the caller wants them."""
        if self.scores is not None:
            self.scores += tuple(scores[node : node + 1].clone() for node in path)
        if self.logits is not None:
            self.logits += tuple(logits[node : node + 1].clone() for node in path)

    def append(self, tokens: list[int], there: Tensor, *, finished: bool) -> None:
        """Append `tokens` to a text of one row; `there` `[t]` holds the same tokens on the target's device."""
        self.length += len(tokens)
        self._ahead.append(there)
        if finished:
            self.unfinished, self.finished = torch.zeros_like(self.unfinished), True
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))

    def pick(self, logits: Tensor) -> Tensor:
        """Pick one token for each row of logits `[any, v]`, without appending; `picks_by_scores` must return true."""
        scores = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        return self._picked(self._logits_processor(cast(torch.LongTensor, self._ids), cast(Any, scores)))

    def _picked(self, scores: Tensor) -> Tensor:
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    def commit(self, logits: Tensor) -> Tensor:
        """Pick one token for each decoded row from logits `[b, v]`, append it, and return the tokens `[b]`."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        if self._decoded is not None:  # draw as many random numbers as plain decoding
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
    """All rows of a call: one `Text` for all rows in lockstep (equally many new tokens per step), or one per row."""

    def __init__(self, texts: list[Text], *, drops_finished: bool) -> None:
        self._texts = texts
        self._decoded = list(range(len(texts)))  # indices of the texts that are still decoded
        self._drops_finished = drops_finished  # whether to leave finished rows out of later steps

    def __len__(self) -> int:
        """Number of rows of the call."""
        return sum(map(len, self._texts))

    @property
    def in_lockstep(self) -> bool:
        """Whether all rows advance by the same number of tokens; also true for a single row."""
        return len(self._texts) == 1

    @property
    def finished(self) -> bool:
        return all(self._texts[index].finished for index in self._decoded)

    @property
    def newest(self) -> Tensor:
        """The last token `[b]` of each decoded row."""
        if self.in_lockstep:
            return self._texts[0].newest
        return torch.cat([text.newest for text in self.decoded_texts])

    @property
    def length(self) -> int:
        """Length of the longest decoded row, in tokens."""
        return max(self._texts[index].length for index in self._decoded)

    @property
    def shortest(self) -> int:
        """Length of the shortest decoded row, in tokens."""
        return min(self._texts[index].length for index in self._decoded)

    @property
    def row_weights(self) -> list[float]:
        """The value of one more token in each decoded row, 1.0 on average; rows that lag have higher values."""
        if self.in_lockstep:
            return [1.0] * self._texts[0].decoded_count
        lengths, shortest = [self._texts[index].length for index in self._decoded], self.shortest
        # the derivative of a soft minimum of the lengths, since the batch ends with its slowest row
        weights = [math.exp((shortest - length) / _PATIENCE) for length in lengths]
        total = sum(weights)
        return [weight * len(weights) / total for weight in weights]

    @property
    def decoded_texts(self) -> list[Text]:
        return [self._texts[index] for index in self._decoded]

    def is_plain_greedy(self, count: int) -> bool:
        return all(text.is_plain_greedy(count) for text in self.decoded_texts)

    def picks_by_scores(self, count: int) -> bool:
        return all(text.picks_by_scores(count) for text in self.decoded_texts)

    def of_all_rows(self, counts: list[int]) -> list[int]:
        """Expand `counts` of decoded rows to a list for all rows of the call, with 0 for rows no longer decoded."""
        every_row = [0] * len(self._texts)
        for index, count in zip(self._decoded, counts, strict=True):
            every_row[index] = count
        return every_row

    def drop_finished(self) -> list[int] | None:
        """See `Text.drop_finished`. Also returns `None` if all rows are finished, or if finished rows must stay."""
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
        """Finished rows that are still decoded, as a map from row to its index among the decoded rows."""
        if self.in_lockstep:
            return self._texts[0].ended
        return {row: place for place, row in enumerate(self._decoded) if self._texts[row].finished}

    @property
    def input_ids(self) -> Tensor:
        """Prompts and answers `[b, s]`, with rows that ended early padded."""
        if self.in_lockstep:
            return self._texts[0].input_ids
        longest = max(text.length for text in self._texts)
        return torch.cat([self._padded(text, longest) for text in self._texts])

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """The processed scores `[b, v]` of each position, if stored. One `Text` must hold all rows of the batch."""
        return self._texts[0].scores

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """The raw logits `[b, v]` of each position, if stored. One `Text` must hold all rows of the batch."""
        return self._texts[0].logits

    @staticmethod
    def _padded(text: Text, length: int) -> Tensor:
        missing = length - text.length
        if not missing:
            return text.input_ids
        assert text.pad_token is not None
        return torch.cat([text.input_ids, text.pad_token.expand(1, missing)], dim=1)
