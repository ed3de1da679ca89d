"""The random numbers of coming positions, drawn as plain sampling would draw them, and given back where unused.

`torch.multinomial` draws one token of each row as a race: the largest p / e wins, where every token's e is drawn from
the exponential distribution of mean 1. These numbers do not depend on p. So they can be drawn for all levels of a
tree
before anybody knows which node the text comes to, and the pick of every node follows: of each level one node is
reached, and its pick is the token that plain sampling draws there.

Source: ATen, `multinomial` in native/Distributions.cpp, its way of a single sample.

What a text would pick at every node of a tree, told before anybody knows which nodes it comes to.

For texts of one row. Rows in lockstep draw together, and those that have ended go on drawing: they are asked in
commit
order.

Read from stopping criteria when a text ends, so that plain greedy decoding need not ask them for each token.

The texts that a call writes: a token is committed with exactly the calls of plain decoding.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ..tree import DraftTree
from .processors import TreeLogitsProcessor


class Draws:
    """Random numbers for as many positions as a tree has levels, the root's included.

    Args:
        count: positions.
        scores: `[n, v]` gives vocabulary, dtype and device.

    Attributes:
        numbers: `[count, v]`.
    """

    def __init__(self, count: int, scores: Tensor) -> None:
        self.numbers = scores.new_empty(count, scores.shape[-1])
        generator = _generator(scores.device)
        assert generator is not None
        self._generator, self._states = generator, [generator.get_state()]
        for position in self.numbers.split(1):
            position.exponential_()
            self._states.append(generator.get_state())

    def pick(self, scores: Tensor, levels: Tensor) -> Tensor:
        """`[n]` the tokens drawn from processed scores `[n, v]`, with the numbers of each row's level, `[n]`.

        -1 where nothing can be drawn from a row.
        """
        best = (scores.softmax(dim=-1) / self.numbers[levels]).max(dim=-1)
        return best.indices.masked_fill(best.values.isnan(), -1)

    def give_back(self, used: int) -> None:
        """Set the generator as if only the first `used` positions had drawn; not if another thread has drawn since."""
        if torch.equal(self._generator.get_state(), self._states[-1]):
            self._generator.set_state(self._states[used])


@cache
def draws_alike(device: torch.device, vocabulary: int) -> bool:
    """Whether `Draws` are those of `torch.multinomial` on a device: seen by doing, with the generator as it was."""
    generator = _generator(device)
    if generator is None:
        return False
    scores = torch.linspace(0, 1, vocabulary, device=device)[None]
    before, count = generator.get_state(), 8
    multinomial = [torch.multinomial(scores.softmax(dim=-1), 1) for _ in range(count)]
    after = generator.get_state()
    generator.set_state(before)
    draws = Draws(count, scores)
    picks = draws.pick(scores.expand(count, -1), torch.arange(count, device=device))
    is_alike = torch.equal(torch.cat(multinomial)[:, 0], picks) and torch.equal(generator.get_state(), after)
    generator.set_state(before)
    return is_alike


def _generator(device: torch.device) -> torch.Generator | None:
    """The generator of a device that plain sampling draws from; `None` where PyTorch does not show it."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators") and not hasattr(module, "get_rng_state"):
        return torch.default_generator  # a backend without random numbers of its own takes the CPU's
    generators: tuple[torch.Generator, ...] = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None


@dataclass(frozen=True, slots=True)
class TreePicks:
    """The picks of one row at all nodes of its tree.

    Attributes:
        tokens: `[n]`; -1 where the scores allow no draw.
        logits: `[n, v]` fp32, the target's.
        scores: `[n, v]` fp32, processed.
        draws: the random numbers of the levels; `None` for greedy picks.
    """

    tokens: Tensor
    logits: Tensor
    scores: Tensor
    draws: Draws | None

    @classmethod
    def of(cls, logits: Tensor, scores: Tensor, tree: DraftTree, *, do_sample: bool) -> "TreePicks":
        """Pick at each of n nodes from its processed scores `[n, v]`."""
        if not do_sample:
            return cls(scores.argmax(dim=-1), logits, scores, None)
        draws = Draws(tree.level_count + 1, scores)
        return cls(draws.pick(scores, tree.depths[0]), logits, scores, draws)

    def settle(self, tokens: list[int]) -> None:
        """Give back the random numbers that the committed `tokens` did not use.

        Raises:
            RuntimeError: no token could be drawn at a committed position.
        """
        if self.draws is None:
            return
        if min(tokens) < 0:
            raise RuntimeError(
                "No token can be drawn, because the processed scores hold NaN, +inf or nothing but -inf. Check the "
                "logits processors, and the dtype of the target."
            )
        self.draws.give_back(len(tokens))


def can_pick_at_once(device: torch.device, do_sample: bool, vocabulary: int) -> bool:
    """Whether picking at all nodes of a tree is right and pays. On a CPU a read is free, and nodes off the path would
    only cost.
    """
    return device.type != "cpu" and (not do_sample or draws_alike(device, vocabulary))


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a text ends, and how long it may get before a criterion logs a warning.

    Attributes:
        token_ids: any of them, once picked.
        length: positions that it may reach.
        warning_free_length: positions up to which the criteria log nothing: Transformers warns of longer texts.
    """

    token_ids: frozenset[int]
    length: int
    warning_free_length: int

    def are_silent(self, length: int) -> bool:
        """Whether no criterion logs a warning of a text before it ends, or reaches `length` positions."""
        return self.warning_free_length == self.length or length <= self.warning_free_length

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "StopConditions | None":
        """Read them; `None` where anything but end tokens and a length may stop a text."""
        lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        tokens = [one for one in criteria if type(one) is EosTokenCriteria]
        if not lengths or len(lengths) + len(tokens) < len(criteria):
            return None
        token_ids = frozenset(token for one in tokens for token in one.eos_token_id.flatten().tolist())
        length = min(one.max_length for one in lengths)
        silent = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
        return cls(token_ids, length, min([length, *silent]))


class Text:
    """The sequences being written, one committed position at a time. All rows of a `Text` advance together.

    Args:
        input_ids: `[b, s]` the prompt.
        logits_processor: called once per committed position, never for a rejected node.
        stopping_criteria: called after each committed position.
        do_sample: draw from the processed scores, else take the largest.
        pad_token: what finished rows are filled with, where an end token is among the criteria.
        streamer: gets each token as it is committed.
        keep_scores: keep the processed scores of each position.
        keep_logits: keep the raw logits of each position.
        keep_padding: go on decoding the padding of finished rows, so that the cache holds it as in plain decoding: for
            callers that reuse the cache.
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
    ) -> None:
        self._ids = input_ids  # lacks the tokens of `_ahead`
        self._ahead: list[Tensor] = []  # `[any]` each, of a single row
        self.length = int(input_ids.shape[1])
        self._written: list[int] = []  # the newest tokens of a single row, as far as the host knows them
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.finished = False
        self.pad_token = pad_token
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        self._logits_processor = logits_processor
        self._stopping_criteria = stopping_criteria
        self._do_sample = do_sample
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._streamer = streamer
        self._keep_padding = keep_padding
        self._has_hooks = bool(logits_processor) or streamer is not None or keep_scores or keep_logits
        self.stop_conditions = StopConditions.of(stopping_criteria) if len(input_ids) == 1 else None
        is_stateless = TreeLogitsProcessor.supports(logits_processor)
        self._tree_processor = TreeLogitsProcessor(logits_processor) if is_stateless else None
        self._decoded: Tensor | None = None  # rows that are still decoded; None for all

    def __len__(self) -> int:
        """Rows of the call."""
        return len(self._ids)

    @property
    def input_ids(self) -> Tensor:
        """`[b, s]` prompt and answer, joined when they are read."""
        if self._ahead:
            ahead = torch.cat(self._ahead).to(self._ids.device)
            self._ids, self._ahead = torch.cat([self._ids, ahead[None]], dim=1), []
        return self._ids

    @property
    def decoded_count(self) -> int:
        """Rows that are still decoded."""
        return len(self if self._decoded is None else self._decoded)

    @property
    def live(self) -> Tensor:
        """Which decoded rows count, `[b]` bool: all but finished ones; those too if there is no end token, or if their
        padding is kept.
        """
        rows = self._of_decoded(self.unfinished)
        return rows.bool() if self._pads and not self._keep_padding else torch.ones_like(rows, dtype=torch.bool)

    @property
    def newest(self) -> Tensor:
        """`[b]` the last token of each decoded row."""
        return self._of_decoded(self.input_ids[:, -1])

    def since(self, start: int) -> list[list[int]]:
        """The tokens of each decoded row from position `start` on."""
        known_from = self.length - len(self._written)
        if self._written and start >= known_from:
            return [self._written[start - known_from :]]
        found: list[list[int]] = self._of_decoded(self.input_ids[:, start:]).tolist()
        return found

    def _of_decoded(self, values: Tensor) -> Tensor:
        return values if self._decoded is None else values[self._decoded]

    def drop_finished(self) -> list[int] | None:
        """Stop decoding finished rows: only padding is to come.

        Returns:
            Of the rows decoded so far, those that go on; `None` when all do.
        """
        going_on = self.live.tolist()
        if all(going_on):
            return None
        kept = [place for place, goes_on in enumerate(going_on) if goes_on]
        rows = torch.arange(len(self), device=self._ids.device)
        self._decoded = self._of_decoded(rows)[kept]
        return kept

    def is_plain_greedy(self, count: int) -> bool:
        """Whether the next `count` tokens are those of the largest logits, up to what `stop_conditions` says: one row,
        no sampling, no hook that sees a token, no warning on the way.
        """
        return self._ends_silently(count) and not self._do_sample and not self._has_hooks

    def picks_at_once(self, tree: DraftTree, logits: Tensor) -> bool:
        """Whether `tree_picks` may pick at every node of a tree before the path is known: of one row, with processors
        and criteria that are known to be stateless, on a device that makes the host wait for each pick.
        """
        device = self._ids.device
        is_known = self._ends_silently(tree.node_count) and self._tree_processor is not None
        is_here = tree.tokens.device == device
        return is_known and is_here and can_pick_at_once(device, self._do_sample, logits.shape[-1])

    def _ends_silently(self, count: int) -> bool:
        conditions = self.stop_conditions
        return conditions is not None and conditions.are_silent(self.length + count)

    def tree_picks(self, tree: DraftTree, logits: Tensor) -> TreePicks:
        """What this one row would gain at every node of its tree; `logits` is `[1, n or more, v]`, padding last."""
        assert self._tree_processor is not None
        raw = logits[0, : tree.node_count].to(dtype=torch.float32, device=self._ids.device)
        read = self.input_ids if self._tree_processor.reads_texts else self._ids  # may lack the newest tokens
        scores = self._tree_processor(read, raw, tree)
        return TreePicks.of(raw, scores, tree, do_sample=self._do_sample)

    def follow(self, picks: TreePicks, path: list[int], tokens: list[int], there: Tensor, *, finished: bool) -> None:
        """Append the tokens that `picks` has at the nodes of `path`, and do what `commit` would have done for each."""
        picks.settle(tokens)
        if self.scores is not None:
            self.scores += tuple(picks.scores[node : node + 1].clone() for node in path)
        if self.logits is not None:
            self.logits += tuple(picks.logits[node : node + 1].clone() for node in path)
        self.extend(tokens, there, finished=finished)
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))

    def extend(self, tokens: list[int], there: Tensor, *, finished: bool) -> None:
        """Append tokens to this one row, which are `there` as well, where the target reads."""
        self.length += len(tokens)
        self._ahead.append(there)
        self._written += tokens
        if finished:
            self.unfinished, self.finished = torch.zeros_like(self.unfinished), True

    def commit(self, logits: Tensor) -> Tensor:
        """Pick and append one token per row from the target's logits `[b, v]` of the decoded rows.

        Returns:
            `[b]` the tokens of the decoded rows.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=self._ids.device)
        if self._decoded is not None:  # a draw takes as many random numbers as in plain decoding
            every_row = logits.new_zeros(len(self), logits.shape[-1])
            logits = every_row.index_copy_(0, self._decoded, logits)
        scores: Tensor = self._logits_processor(cast(torch.LongTensor, self.input_ids), cast(Any, logits))
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self._do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._pads:
            assert self.pad_token is not None
            tokens = tokens * self.unfinished + self.pad_token * (1 - self.unfinished)
        self._ids, self._written = torch.cat([self.input_ids, tokens[:, None]], dim=-1), []
        self.length += 1
        self.unfinished = self.unfinished & ~self._stopping_criteria(
            cast(torch.LongTensor, self.input_ids), cast(Any, self.scores)
        )
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        self.finished = bool(self.unfinished.max() == 0)
        return self._of_decoded(tokens)
