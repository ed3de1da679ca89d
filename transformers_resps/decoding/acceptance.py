"""The acceptance rule: at each node the target picks a token, and the walk goes on to the child with that token.

For each token the functions of plain sampling (Transformers' `_sample`) are called: logits processors, one pick (an
argmax or a draw), stopping criteria, streamer. So the target draws every token given its prefix, with the random
numbers of plain decoding. This is lossless for any tree that was built without knowing the picks, and the same seed
gives the same text. The usual rule, which accepts a child with probability `min(1, p/q)`, is not lossless if children
are the best by score and not drawn from q (a test shows it).

`accept` is the rule. `accept_picks` gives the same result with fewer calls, if nothing observes single tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..tree import DraftTree, first_children
from .text import Batch, Text


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The tokens that a step added to the decoded rows, and the tree nodes that it keeps."""

    path: Tensor  # [b, m] kept nodes, root first; short rows repeat their last node; undefined for finished rows
    tokens: Tensor  # [b, m] the token picked after each node; the last one is the next root
    paths: list[list[int]]  # kept nodes of each row, on the host
    picks: list[list[int]]  # picked tokens of each row, on the host
    emitted: list[int]  # number of tokens that each row of the call gained, without padding; 0 if it is finished

    @property
    def counts(self) -> list[int]:
        return list(map(len, self.paths))

    @property
    def is_front(self) -> bool:
        """Whether every row accepted exactly the tree's first m nodes."""
        return all(path == list(range(self.path.shape[1])) for path in self.paths)

    @property
    def gained(self) -> list[bool]:
        """For each decoded row, whether it gained tokens: false only for finished rows that are still decoded."""
        every_row = len(self.emitted) == len(self.paths)
        return [count > 0 for count in self.emitted] if every_row else [True] * len(self.paths)

    @classmethod
    def from_rows(cls, paths: list[list[int]], picks: list[list[int]], device: torch.device) -> "Acceptance":
        """Make an `Acceptance` from each row's kept nodes and picked tokens, with one copy to the device."""
        filled = torch.tensor([_filled(paths), _filled(picks)], device=device)
        return cls(filled[0], filled[1], paths, picks, list(map(len, paths)))

    @classmethod
    def of_picks(cls, picks: "Picks", paths: list[list[int]], picked: list[list[int]]) -> "Acceptance":
        """Make an `Acceptance` from each row's kept nodes and picked tokens; with `picks.tokens` nothing is copied."""
        device = picks.logits.device
        if picks.tokens is None:
            return cls.from_rows(paths, picked, device)
        emitted = list(map(len, paths))
        order = torch.arange(picks.tokens.shape[1], device=device)
        front = list(range(max(emitted)))
        if all(path == front for path in paths):
            path, tokens = order[: len(front)].expand(len(paths), -1), picks.tokens[:, : len(front)]
        else:
            nodes = order.split(1)
            path = torch.cat([nodes[node] for row in _filled(paths) for node in row]).view(len(paths), -1)
            tokens = picks.tokens.gather(1, path)
        return cls(path, tokens, paths, picked, emitted)


def read_picks(batch: Batch, tree: DraftTree, logits: Tensor) -> "Picks | None":
    """Pick a token at every node from logits `[b, n, v]`; return `None` if `accept_batch` picks on paths only."""
    texts = batch.decoded_texts
    if batch.is_plain_greedy(tree.node_count):
        return None if logits.device.type == "cpu" else Picks.read(tree, logits)
    text, device = texts[0], tree.tokens.device
    is_known = len(texts) == 1 and text.can_process_at_once(tree)
    if is_known and can_pick_at_once(device, text.do_sample, logits.shape[-1]):
        return Picks.read(tree, logits, ProcessedPicks.of(text, tree, logits))
    return None


def accept_batch(
    batch: Batch, tree: DraftTree, logits: Tensor, picks: "Picks | None", reached: list[list[int]] | None = None
) -> Acceptance:
    """Append the tokens that the target picks to every decoded row; return these tokens and the accepted nodes.

    `picks` is the result of `read_picks`, if it was called. `reached` is passed to `accept` for rows in lockstep.
    """
    texts = batch.decoded_texts
    if picks is None and batch.is_plain_greedy(tree.node_count):
        picks = Picks(tree.children(), None, logits)
    elif picks is None and batch.picks_by_scores(tree.node_count):
        picks = Picks(tree.children(), None, logits, pick=texts[0].pick)
    if picks is not None:
        acceptance = accept_picks(picks, texts)
    elif batch.in_lockstep:
        return accept(tree, logits, texts[0], reached)
    else:
        parts = [accept(tree.row(row), logits[row : row + 1], text) for row, text in enumerate(texts)]
        rows = [part.paths[0] for part in parts], [part.picks[0] for part in parts]
        acceptance = Acceptance.from_rows(*rows, logits.device)
    return replace(acceptance, emitted=batch.of_all_rows(acceptance.counts))


def accept(tree: DraftTree, logits: Tensor, text: Text, reached: list[list[int]] | None = None) -> Acceptance:
    """Append tokens picked from logits `[b, n, v]` to `text`, until a token is not in the tree or the text ends.

    All rows gain as many tokens as the unfinished row that accepts least. Before each pick, a list with each row's
    current node is appended to `reached`, so that the caller knows the paths so far if an error is raised.
    """
    children, rows, nodes = tree.children(), list(range(len(logits))), [0] * len(logits)
    path: list[list[int]] = [] if reached is None else reached
    picks, emitted = [], torch.zeros_like(text.unfinished)
    going_on = sum(text.live.tolist()) if text.stops_at_ends else 0
    while True:
        path.append(nodes)
        emitted = emitted + text.unfinished
        tokens = text.commit(logits_at(rows, nodes, logits))
        picks.append(tokens)
        if text.finished or tree.node_count == 1:
            break
        live = text.live.tolist()
        if sum(live) < going_on:
            break
        following = _next_nodes(children, nodes, tokens.tolist(), live)
        if following is None:
            break
        nodes = following
    tokens = torch.stack(picks, dim=1)
    followed = torch.tensor(path, device=logits.device).T
    paths = [list(own) for own in zip(*path, strict=True)]
    return Acceptance(followed, tokens.to(logits.device), paths, tokens.tolist(), emitted.tolist())


def _next_nodes(
    children: list[dict[tuple[int, int], int]], nodes: list[int], tokens: list[int], live: list[bool]
) -> list[int] | None:
    """For each row, find the child of `nodes[row]` with `tokens[row]`; `None` if a live row has no such child."""
    children_of_picks = [own.get(at) for own, at in zip(children, zip(nodes, tokens, strict=True), strict=True)]
    if any(is_live and node is None for is_live, node in zip(live, children_of_picks, strict=True)):
        return None
    return [node or 0 for node in children_of_picks]


def accept_picks(picks: "Picks", texts: list[Text]) -> Acceptance:
    """Append to `texts`, one `Text` per row, the same tokens as `accept`, but with fewer calls."""
    paths, picked = _walk(picks, texts)
    acceptance = Acceptance.of_picks(picks, paths, picked)
    for row, (text, path, own) in enumerate(zip(texts, paths, picked, strict=True)):
        if picks.processed is not None:
            picks.processed.settle(own)
            text.keep_outputs(path, picks.processed.logits, picks.processed.scores)
        text.append(own, acceptance.tokens[row, : len(own)], finished=text.ends_with(own[-1], len(own)))
    return acceptance


def _walk(picks: "Picks", texts: list[Text]) -> tuple[list[list[int]], list[list[int]]]:
    """Follow each row's picks down its tree; return each row's nodes, root first, and the token picked after each."""
    paths: list[list[int]] = [[] for _ in texts]
    picked: list[list[int]] = [[] for _ in texts]
    going = dict.fromkeys(range(len(texts)), 0)  # row -> its current node
    while going:
        rows, nodes = list(going), list(going.values())
        tokens = picks.at(rows, nodes)
        going = {}
        for row, node, token in zip(rows, nodes, tokens, strict=True):
            paths[row].append(node)
            picked[row].append(token)
            child = picks.children[row].get((node, token))
            if child is not None and not texts[row].ends_with(token, len(picked[row])):
                going[row] = child
    return paths, picked


def _filled(rows: list[list[int]]) -> list[list[int]]:
    """Pad rows to equal length by repeating their last number."""
    longest = max(map(len, rows))
    return [row + row[-1:] * (longest - len(row)) for row in rows]


@dataclass(frozen=True, slots=True)
class Picks:
    """The tokens that the target picks at a tree's nodes: picked in advance at all nodes, or when `at` is called."""

    children: list[dict[tuple[int, int], int]]  # see `DraftTree.children`
    rows: list[list[int]] | None  # the token of each row at every node; `None` if `at` picks them when called
    logits: Tensor  # [b, n, v]
    tokens: Tensor | None = None  # `rows` on the target's device, [b, n]; `None` if `at` picks
    processed: "ProcessedPicks | None" = None  # scores and random numbers; `None` if tokens are the argmax of `logits`
    pick: Callable[[Tensor], Tensor] | None = None  # maps logits [r, v] of r nodes to tokens [r]; `None`: the argmax

    @classmethod
    def read(cls, tree: DraftTree, logits: Tensor, processed: "ProcessedPicks | None" = None) -> "Picks":
        """Make `Picks` from the target's token at every node, on the host: `processed.tokens`, or the argmax."""
        tokens = logits[:, : tree.node_count].argmax(-1) if processed is None else processed.tokens[None]
        if tree.node_count == 1:
            return cls([{} for _ in tokens], tokens.tolist(), logits, tokens, processed)
        parents, drafted = (part.to(tokens.device) for part in (tree.parents, tree.tokens))
        parents, drafted, rows = torch.stack([parents, drafted, tokens]).tolist()
        return cls(first_children(tree.row_sizes, parents, drafted), rows, logits, tokens, processed)

    def at(self, rows: list[int], nodes: list[int]) -> list[int]:
        """Return the token picked at `nodes[i]` of `rows[i]`, for each i."""
        if self.rows is not None:
            return [self.rows[row][node] for row, node in zip(rows, nodes, strict=True)]
        logits = logits_at(rows, nodes, self.logits)
        return (_largest(logits) if self.pick is None else self.pick(logits)).tolist()


@dataclass(frozen=True, slots=True)
class ProcessedPicks:
    """The tokens picked from processed scores at all nodes of one row's tree, before the accepted path is known."""

    tokens: Tensor  # [n]; -1 if the softmax of the scores is NaN
    logits: Tensor  # [n, v] fp32, raw
    scores: Tensor  # [n, v] fp32, processed
    draws: "Draws | None"  # the random numbers of each level; None for greedy picks

    @classmethod
    def of(cls, text: Text, tree: DraftTree, logits: Tensor) -> "ProcessedPicks":
        """Pick a token at each of n nodes with the settings of `text`, from logits `[1, n or more, v]`."""
        raw, scores = text.process(tree, logits)
        if not text.do_sample:
            return cls(scores.argmax(dim=-1), raw, scores, None)
        draws = Draws(tree.level_count + 1, scores)
        return cls(draws.pick(scores, tree.depths[0]), raw, scores, draws)

    def settle(self, tokens: list[int]) -> None:
        """Rewind the random generator to its state after `tokens`; raise `RuntimeError` if one is -1 (NaN scores)."""
        if self.draws is None:
            return
        if min(tokens) < 0:
            raise RuntimeError(
                "No token can be drawn, because the processed scores hold NaN, +inf or nothing but -inf. Check the "
                "logits processors, and the dtype of the target."
            )
        self.draws.give_back(len(tokens))


class Draws:
    """Draws the random numbers that plain sampling would draw, for `count` levels of a tree.

    `torch.multinomial` picks the token with the largest p / e, where e is drawn for every token from the exponential
    distribution of mean 1 (ATen, `multinomial` in native/Distributions.cpp, a single sample). As e does not depend on
    p, the numbers of all levels can be drawn before the path is known. `scores` `[n, v]` give v, dtype and device.
    """

    def __init__(self, count: int, scores: Tensor) -> None:
        self.numbers = scores.new_empty(count, scores.shape[-1])  # [count, v]
        generator = _generator(scores.device)
        assert generator is not None
        self._generator, self._states = generator, [generator.get_state()]
        for position in self.numbers.split(1):
            position.exponential_()
            self._states.append(generator.get_state())

    def pick(self, scores: Tensor, levels: Tensor) -> Tensor:
        """Sample each node's token from scores `[n, v]` with the numbers of its level; -1 if the softmax is NaN."""
        best = (scores.softmax(dim=-1) / self.numbers[levels]).max(dim=-1)
        return best.indices.masked_fill(best.values.isnan(), -1)

    def give_back(self, used: int) -> None:
        """Set the generator to its state after `used` levels, unless another thread has drawn numbers since."""
        if torch.equal(self._generator.get_state(), self._states[-1]):
            self._generator.set_state(self._states[used])


@cache
def draws_alike(device: torch.device, vocabulary: int) -> bool:
    """Test whether `Draws` and `torch.multinomial` draw the same tokens on a device; leave the generator unchanged."""
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
    """Return the random generator that `torch.multinomial` uses on a device; `None` if PyTorch does not expose it."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators") and not hasattr(module, "get_rng_state"):
        return torch.default_generator  # a backend without a generator uses the CPU's
    generators: tuple[torch.Generator, ...] = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None


def can_pick_at_once(device: torch.device, do_sample: bool, vocabulary: int) -> bool:
    """Whether to pick at all nodes at once; false on a CPU (no gain), and if `Draws` differs from `multinomial`."""
    return device.type != "cpu" and (not do_sample or draws_alike(device, vocabulary))


_BLOCK = 256


def _largest(logits: Tensor) -> Tensor:
    """Return the argmax of each row of logits `[r, v]`; for bfloat16 on a CPU twice as fast as `torch.argmax`."""
    size = math.gcd(logits.shape[1], _BLOCK)
    if size == 1:
        return logits.argmax(-1)
    blocks = logits.unflatten(1, (-1, size))
    block: Tensor = blocks.amax(-1).argmax(-1)
    within: Tensor = blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return block * size + within


def logits_at(rows: list[int], nodes: list[int], logits: Tensor) -> Tensor:
    """Select from logits `[b, n, v]` the logits `[r, v]` at `nodes[i]` of `rows[i]`, for each i of r = `len(rows)`."""
    if len(rows) == len(logits) and len(set(nodes)) == 1:
        return logits[:, nodes[0]]
    return logits[rows, nodes]
