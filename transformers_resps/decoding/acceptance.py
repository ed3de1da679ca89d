"""The acceptance rule: follow the target's picks down the tree.

Each committed position makes the calls of plain sampling (Transformers' `_sample`): logits processors, one pick by the
target, stopping criteria, streamer. The walk goes on if a child carries the pick. So every token is the target's draw
given its prefix, with the random numbers of plain decoding: lossless for any tree that was built without looking at
the picks, and identical with the same seed. Accepting chosen children by `min(1, p/q)` is not lossless (a test shows
it).

`accept` is the rule. `accept_picks` follows it with fewer calls, where nothing observes single tokens.
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
    """The tokens that a step added to the decoded rows."""

    path: Tensor  # [b, m] nodes used, root first; short rows repeat their last node, finished rows hold anything
    tokens: Tensor  # [b, m] the picks after these nodes; the last one is the next root
    paths: list[list[int]]  # nodes that each row kept, on the host
    picks: list[list[int]]  # tokens that each row kept, on the host
    emitted: list[int]  # tokens that each row of the call gained, decoded or not, without padding after its end

    @property
    def counts(self) -> list[int]:
        """Nodes that each row kept."""
        return list(map(len, self.paths))

    @property
    def is_front(self) -> bool:
        """Whether all rows kept the same number of nodes, the first ones of the tree in order."""
        return all(path == list(range(self.path.shape[1])) for path in self.paths)

    @property
    def gained(self) -> list[bool]:
        """Whether each decoded row gained tokens: all do, unless finished rows are decoded with them."""
        every_row = len(self.emitted) == len(self.paths)
        return [count > 0 for count in self.emitted] if every_row else [True] * len(self.paths)

    @classmethod
    def from_rows(cls, paths: list[list[int]], picks: list[list[int]], device: torch.device) -> "Acceptance":
        """Join the paths and picks of rows, with one copy to the device."""
        filled = torch.tensor([_filled(paths), _filled(picks)], device=device)
        return cls(filled[0], filled[1], paths, picks, list(map(len, paths)))

    @classmethod
    def of_picks(cls, picks: "Picks", paths: list[list[int]], picked: list[list[int]]) -> "Acceptance":
        """Join the paths and picks of rows, without a copy where the device has the picks."""
        if picks.tokens is None:
            return cls.from_rows(paths, picked, picks.device)
        emitted = list(map(len, paths))
        order = torch.arange(picks.tokens.shape[1], device=picks.device)
        front = list(range(max(emitted)))
        if all(path == front for path in paths):
            path, tokens = order[: len(front)].expand(len(paths), -1), picks.tokens[:, : len(front)]
        else:
            nodes = order.split(1)
            path = torch.cat([nodes[node] for row in _filled(paths) for node in row]).view(len(paths), -1)
            tokens = picks.tokens.gather(1, path)
        return cls(path, tokens, paths, picked, emitted)


def read_picks(batch: Batch, tree: DraftTree, logits: Tensor) -> "Picks | None":
    """Read the target's picks at all nodes from logits `[b, n, v]` with one wait for the target.

    Returns `None` where `accept_batch` has to pick one token after the other.
    """
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
    """Commit the target's picks in every decoded row; see `accept` for `reached`, which rows in lockstep fill."""
    texts = batch.decoded_texts
    if picks is None and batch.is_plain_greedy(tree.node_count):
        picks = Picks.asked(tree, logits)
    elif picks is None and batch.picks_by_scores(tree.node_count):
        picks = Picks.asked(tree, logits, texts[0].pick)
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
    """Commit the picks of logits `[b, n, v]` to `text`, until one is not in the tree or the text is finished.

    All rows commit as many tokens as the live row with the shortest run. `reached` gains each level's nodes of all
    rows before the pick, since an error may end the walk.
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
    """Find the children of `nodes` that carry the picks `tokens`; `None` if a live row's pick was not drafted."""
    children_of_picks = [own.get(at) for own, at in zip(children, zip(nodes, tokens, strict=True), strict=True)]
    if any(is_live and node is None for is_live, node in zip(live, children_of_picks, strict=True)):
        return None
    return [node or 0 for node in children_of_picks]


def accept_picks(picks: "Picks", texts: list[Text]) -> Acceptance:
    """Do what `accept` does, without calls for each token: `texts`, one for each row, gain the same picks."""
    paths, picked = _walk(picks, texts)
    acceptance = Acceptance.of_picks(picks, paths, picked)
    for row, (text, path, own) in enumerate(zip(texts, paths, picked, strict=True)):
        if picks.processed is not None:
            picks.processed.settle(own)
            text.keep_outputs(path, picks.processed.logits, picks.processed.scores)
        text.append(own, acceptance.tokens[row, : len(own)], finished=text.ends_with(own[-1], len(own)))
    return acceptance


def _walk(picks: "Picks", texts: list[Text]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the nodes that each row follows, root first, and the picks after them."""
    paths: list[list[int]] = [[] for _ in texts]
    picked: list[list[int]] = [[] for _ in texts]
    going = dict.fromkeys(range(len(texts)), 0)  # row -> the node that it has reached
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
    """Fill rows to equal length by repeating their last number."""
    longest = max(map(len, rows))
    return [row + row[-1:] * (longest - len(row)) for row in rows]


class Picks:
    """The target's picks at the nodes of a tree, and the children to which they lead.

    Args:
        children: see `DraftTree.children`.
        rows: each row's pick at every node; `None` picks from `logits` along the path, since reads are free on a CPU.
        logits: `[b, n, v]`.
        tokens: `[b, n]` the picks on their device; `None` on a CPU.
        processed: the processed scores and draws, where there are any.
        pick: `[r, v]` logits -> `[r]` tokens, called in commit order; `None` takes the largest.
    """

    def __init__(
        self,
        children: list[dict[tuple[int, int], int]],
        rows: list[list[int]] | None,
        logits: Tensor,
        tokens: Tensor | None = None,
        processed: "ProcessedPicks | None" = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._pick = pick
        self.children, self.tokens, self.processed, self.device = children, tokens, processed, logits.device
        self._rows, self._logits = rows, logits

    @classmethod
    def asked(cls, tree: DraftTree, logits: Tensor, pick: Callable[[Tensor], Tensor] | None = None) -> "Picks":
        """Make each pick when `at` asks for it."""
        return cls(tree.children(), None, logits, pick=pick)

    @classmethod
    def read(cls, tree: DraftTree, logits: Tensor, processed: "ProcessedPicks | None" = None) -> "Picks":
        """Read the `processed` picks, or the largest logits, and the tree with one wait for the target."""
        tokens = logits[:, : tree.node_count].argmax(-1) if processed is None else processed.tokens[None]
        if tree.node_count == 1:
            return cls([{} for _ in tokens], tokens.tolist(), logits, tokens, processed)
        parents, drafted = (part.to(tokens.device) for part in (tree.parents, tree.tokens))
        parents, drafted, rows = torch.stack([parents, drafted, tokens]).tolist()
        return cls(first_children(tree.row_sizes, parents, drafted), rows, logits, tokens, processed)

    def at(self, rows: list[int], nodes: list[int]) -> list[int]:
        """Return the pick at one node in each of these rows."""
        if self._rows is not None:
            return [self._rows[row][node] for row, node in zip(rows, nodes, strict=True)]
        logits = logits_at(rows, nodes, self._logits)
        found: list[int] = (_largest(logits) if self._pick is None else self._pick(logits)).tolist()
        return found


@dataclass(frozen=True, slots=True)
class ProcessedPicks:
    """The picks at all nodes of a tree of one row, made before its path is known."""

    tokens: Tensor  # [n]; -1 where the scores allow no draw
    logits: Tensor  # [n, v] fp32, the target's
    scores: Tensor  # [n, v] fp32, processed
    draws: "Draws | None"  # the random numbers of each level; None for greedy picks

    @classmethod
    def of(cls, text: Text, tree: DraftTree, logits: Tensor) -> "ProcessedPicks":
        """Pick at each of n nodes as `text` would there, from logits `[1, n or more, v]`, padding last."""
        raw, scores = text.process(tree, logits)
        if not text.do_sample:
            return cls(scores.argmax(dim=-1), raw, scores, None)
        draws = Draws(tree.level_count + 1, scores)
        return cls(draws.pick(scores, tree.depths[0]), raw, scores, draws)

    def settle(self, tokens: list[int]) -> None:
        """Give back the random numbers that the committed `tokens` did not use, or raise if one could not be drawn."""
        if self.draws is None:
            return
        if min(tokens) < 0:
            raise RuntimeError(
                "No token can be drawn, because the processed scores hold NaN, +inf or nothing but -inf. Check the "
                "logits processors, and the dtype of the target."
            )
        self.draws.give_back(len(tokens))


class Draws:
    """Random numbers for `count` levels of a tree, drawn as plain sampling would draw them.

    `torch.multinomial` takes the token with the largest p / e, where e is drawn for every token from the exponential
    distribution of mean 1 (ATen, `multinomial` in native/Distributions.cpp, a single sample). As e does not depend on
    p, all levels can be drawn before the path is known. `scores` `[n, v]` gives vocabulary, dtype and device.
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
        """Draw tokens `[n]` from processed scores `[n, v]` at `levels` `[n]`; -1 where a row allows no draw."""
        best = (scores.softmax(dim=-1) / self.numbers[levels]).max(dim=-1)
        return best.indices.masked_fill(best.values.isnan(), -1)

    def give_back(self, used: int) -> None:
        """Set the generator back to `used` positions, unless another thread has drawn since."""
        if torch.equal(self._generator.get_state(), self._states[-1]):
            self._generator.set_state(self._states[used])


@cache
def draws_alike(device: torch.device, vocabulary: int) -> bool:
    """Whether `Draws` equal `torch.multinomial` on a device, by a trial that restores the generator."""
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
    """Return the generator that plain sampling uses on a device; `None` where PyTorch does not show it."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators") and not hasattr(module, "get_rng_state"):
        return torch.default_generator  # a backend without a generator uses the CPU's
    generators: tuple[torch.Generator, ...] = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None


def can_pick_at_once(device: torch.device, do_sample: bool, vocabulary: int) -> bool:
    """Whether picking at all nodes gives plain draws and pays; on a CPU, where reads are free, it does not pay."""
    return device.type != "cpu" and (not do_sample or draws_alike(device, vocabulary))


_BLOCK = 256


def _largest(logits: Tensor) -> Tensor:
    """Return the `argmax` of logits `[r, v]` by blocks: twice as fast as PyTorch's for bfloat16 on a CPU."""
    size = math.gcd(logits.shape[1], _BLOCK)
    if size == 1:
        return logits.argmax(-1)
    blocks = logits.unflatten(1, (-1, size))
    block: Tensor = blocks.amax(-1).argmax(-1)
    within: Tensor = blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return block * size + within


def logits_at(rows: list[int], nodes: list[int], logits: Tensor) -> Tensor:
    """Take the logits `[r, v]` of one node in each of r rows of `[b, n, v]`; no copy if all take the same node."""
    if len(rows) == len(logits) and len(set(nodes)) == 1:
        return logits[:, nodes[0]]
    return logits[rows, nodes]
