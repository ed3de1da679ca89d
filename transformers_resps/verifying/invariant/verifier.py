"""Verify trees in the exact mode (`invariant=True`): a node's logits depend only on its own text."""

import sys
from collections.abc import Callable, Hashable
from functools import partial
from hashlib import sha256
from math import gcd
from threading import Lock
from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...tree import DraftTree, Pricing, moved
from ..forward import Features, TargetForward
from ..prepacking import is_prepacked
from ..slots.buffers import SlotBuffers, parts_of
from ..slots.engine import LEAST_ROWS, SlotEngine, padded_count
from ..slots.forwards import SlotForward, node_positions
from ..slots.steps import VerifyingSteps
from ..slots.texts import SPARE, WINDOW, SlotTexts, rounded_up, windowed
from .attention import BLOCK, BlockLayout, levels_below
from .forwards import InvariantForward, InvariantInputs, PartForward, PartInputs
from .row_classes import RowNeeds, kernel_settings


_CHUNK = 128  # Largest number of prompt tokens in a forward; results do not depend on it.
_TRIED = (2, 3, 4, 5, 8, 17, 32, 48)  # Lengths of the chains over which compiled code is checked.
_PLACE = 100  # Number of tokens of the text before these chains.


class ModelCode:
    """Checks that a model's compiled code always computes the same bits for the same text.

    The checks run over `sample`, tokens of a prompt: over random tokens, compiled and eager code differ more.
    `compared` holds row counts and kernel settings for which code has passed. A forward that changes the name of the
    target's attention holds `lock`.
    """

    def __init__(self) -> None:
        self.lock, self.sample = Lock(), list[int]()
        self._weights: object = None  # changes with the weights of the checked code
        self.compared: set[Hashable] = set()
        self._bits: dict[Hashable, bytes] = {}  # kernel settings -> how code rounds the sample

    def check(self, engine: SlotEngine, rows: int, answers: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
        """Check, once for the same weights, that compiled forwards of `rows` rows give a text the same bits.

        `answers` computes logits `[t, v]` of a chain of tokens after a sample text and, by other forwards, a list of
        logits of the chain's first tokens. Raises a `ValueError` if any bit of the list differs from the chain's
        logits, or if the chain's logits differ from those of an earlier check with other `rows`.
        """
        if self._weights is not engine.packages:
            self._weights, self._bits = engine.packages, {}
            self.compared.clear()
        settings = tuple(kernel_settings().values())
        if (rows, *settings) in self.compared:
            return
        with engine.preparing():
            known, others = answers()
        if not all(torch.equal(logits, known[: len(logits)]) for logits in others):
            self.refuse(engine.owner, "a row by what stands beside it")
        bits = sha256(known[: _TRIED[-1]].contiguous().view(torch.uint8).numpy().tobytes()).digest()
        if self._bits.setdefault(settings, bits) != bits:
            self.refuse(engine.owner, "a text in several ways")
        self.compared.add((rows, *settings))

    def refuse(self, target: PreTrainedModel, what: str) -> NoReturn:
        """Raise a `ValueError` that says that compiled code rounds `what`, such as "a text in several ways"."""
        raise ValueError(
            f"{type(target).__name__} rounds {what} when it runs compiled: only kernels of ours do not, in bfloat16, "
            "on CPUs with AVX512-BF16, in code that is kept. Call `generate` with `compile=False`."
        )


def _run(
    forward: TargetForward,
    over_slots: SlotForward,
    engine: SlotEngine | None,
    inputs: tuple[Tensor, ...],
    buffers: list[Tensor],
    row: int = 0,
) -> tuple[Tensor, Features]:
    """Run a forward over static buffers; return logits and features. For `row` see `SlotEngine.forward`.

    Raises a `RuntimeError` if the forward cannot be compiled, since eager code would round differently.
    """
    if engine is None:
        outputs, features = forward.catch(lambda: over_slots(inputs, buffers))
        return outputs[0], features
    outputs = engine.forward(over_slots, inputs, buffers, row)
    if engine.is_broken:
        raise RuntimeError(
            f"The target's steps could not run compiled: {engine.obstacle}. As they are, they round "
            "otherwise, so call `generate` with `compile=False` to write a text in one way."
        )
    return outputs[0], Features(forward.layers, over_slots.features(outputs, inputs, forward.layers))


class InvariantSteps(VerifyingSteps):
    """Runs a target over trees and chunks of prompts so that a node's logits depend only on its own text. A row's text
    begins at slot 0, without padding. With an `engine`, compiled code multiplies by our kernels, each row by itself.
    """

    def __init__(
        self, forward: TargetForward, texts: SlotTexts, needs: RowNeeds, code: ModelCode, engine: SlotEngine | None
    ) -> None:
        self.forward, self.texts, self.needs, self.engine, self._code = forward, texts, needs, engine, code
        self.pricing = Pricing(paths_cost=engine is None)  # our kernels compute paths as further rows
        # compiled code returns features, else hooks catch them
        layers: list[int] | None = [] if engine is None else None
        self._over_slots = InvariantForward(code.lock, needs.forward, forward.target, texts.pattern, layers)
        self._fewest = LEAST_ROWS if is_prepacked(forward.target) else 1  # else more rows take longer

    def begin(self, cache: Cache) -> None:
        self.texts.buffers.clear()
        if self.engine is not None:
            self.forward.stop_catching()  # code that is compiled with hooks would always run them

    def run(self, inputs: tuple[Tensor, ...], buffers: list[Tensor]) -> tuple[Tensor, Features]:
        """Run the target over `InvariantInputs` and a `BlockLayout`; return kept logits `[b, k, v]`, and features."""
        return _run(self.forward, self._over_slots, self.engine, inputs, buffers)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        texts, rows = self.texts, self.texts.count
        is_chain = all(parents == [0, *range(tree.node_count - 1)] for parents in tree.parents.tolist())
        self.check_code(rows)
        self.pricing = self.pricing._replace(least_nodes=self.count(1, rows))
        count = self.count(tree.node_count, rows)
        tokens, depths, ancestors, roots = texts.nodes(tree, count)
        layout = self.layout(texts.roots, depths, tree.node_count, None if is_chain else ancestors)
        positions = node_positions(roots[:, 1:], depths)
        inputs = InvariantInputs(tokens, depths, texts.roots, positions, texts.first(count))
        texts.reserve(max(max(texts.places) + count, layout.shared.numel()))
        return self.run((*inputs, *layout), texts.buffers.parts())

    def step(self, rows: int) -> int:
        """Return a number: in a forward of `rows` rows, the node count of a row must be a multiple of this number."""
        return self.needs.forward // gcd(self.needs.forward, rows)

    def count(self, nodes: int, rows: int, step: int | None = None) -> int:
        """Round each row's number of nodes up to a multiple of `step`, by default `self.step(rows)`."""
        step = step or self.step(rows)
        if self.engine is None:
            return rounded_up(max(nodes, -(-self._fewest // rows)), step)
        count = rounded_up(padded_count(self.texts.rows.device, nodes, rows), step)
        return count + step * (count == rows)  # code compiled for equal sizes assumes that they stay equal

    def layout(self, roots: Tensor, depths: Tensor, count: int, ancestors: Tensor | None = None) -> BlockLayout:
        """Make the layout of a chain, or of a tree if `ancestors` are given; nodes from `count` on are padding."""
        is_compiled = self.engine is not None
        least = 2 if is_compiled else 0  # sizes of 0 and 1 would need code of their own
        if ancestors is None:
            layout = BlockLayout.of_chain(roots, depths, least)
        else:
            layout = BlockLayout.of_tree(roots, depths, ancestors, least)
        return layout.of_nodes(count, compiled=is_compiled)

    def check_code(self, rows: int, sample: Tensor | None = None) -> None:
        """Check compiled code for `rows` rows, see `ModelCode.check`. The first prompt becomes the code's sample."""
        if self.engine is not None:
            if sample is not None and not self._code.sample:
                self._code.sample = sample[: 2 * _PLACE].tolist()
            self._code.check(self.engine, rows, partial(self._answers, rows))

    def _answers(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        *fewer, most = _tried(rows)
        buffers, text = SlotBuffers(), torch.arange(_PLACE).expand(rows, -1)
        size = windowed(_PLACE + self.count(most, rows, 1)) + SPARE
        buffers.reserve(parts_of(self.texts.pattern), rows, size)
        parts, inputs = buffers.parts(), self._trial_inputs(text, 0)
        self._over_slots((*inputs, *BlockLayout.of_chain(inputs.roots, text)), parts)  # the sample's first tokens
        answers = [self._answer(count, parts, is_chain=True) for count in (most, *fewer)]
        return answers[0], answers[1:] + [self._answer(count, parts, is_chain=False) for count in _TRIED]

    def _answer(self, count: int, buffers: list[Tensor], *, is_chain: bool) -> Tensor:
        """Compute the first row's logits `[count, v]` for `count` successive tokens, by code for chains or trees."""
        rows = len(buffers[0])
        parents = (torch.arange(count) - 1).clamp(min=0).expand(rows, -1)
        tree = DraftTree.from_parents(torch.zeros_like(parents), parents).padded(self.count(count, rows, 1))
        inputs = self._trial_inputs(tree.depths, _PLACE)
        layout = self.layout(inputs.roots, tree.depths, count, None if is_chain else tree.ancestors)
        return self.run((*inputs, *layout), buffers)[0][0, :count]

    def _trial_inputs(self, depths: Tensor, place: int) -> InvariantInputs:
        """Make inputs for nodes at `depths` `[b, n]` after index `place` of a text that repeats the sample."""
        places, ends, sample = place + depths, self.texts.rows, self._code.sample
        tokens = torch.tensor(sample)[places % len(sample)]
        last = sys.maxsize if ends.last_position is None else ends.last_position
        planes = torch.zeros_like(torch.tensor(ends.shifts[0]))  # some targets count in floats
        positions = (places[..., None] + planes).clamp(max=last)
        first = self.texts.first(depths.shape[1])
        return InvariantInputs(tokens, depths, torch.full((len(depths), 1), place), positions, first)


class ExactSteps(VerifyingSteps):
    """Runs forwards of one row and a fixed number of nodes, for kernels whose rounding depends on a product's sizes.

    Larger trees take several forwards. `chunks` reads prompts, without compiled code.
    """

    pricing = Pricing(paths_cost=True)

    def __init__(self, chunks: InvariantSteps, code: ModelCode, engine: SlotEngine | None) -> None:
        self._chunks, self._engine, self._nodes = chunks, engine, chunks.needs.forward
        forward, texts = chunks.forward, chunks.texts
        layers = [] if engine is None else forward.layers
        self._over_slots = PartForward(code.lock, self._nodes, forward.target, texts.pattern, layers)

    def begin(self, cache: Cache) -> None:
        self._chunks.begin(cache)

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Run the target over each row's tree in parts; earlier parts have written their entries to the buffers."""
        forward, texts, step = self._chunks.forward, self._chunks.texts, self._nodes
        self.pricing = self.pricing._replace(least_nodes=step)
        count = rounded_up(tree.node_count, step)
        tokens, depths, ancestors, roots = texts.nodes(tree, count)
        rows, blocks = len(tree.tokens), texts.first(texts.reserve(max(texts.places) + count) // BLOCK)
        read = list[tuple[Tensor, dict[int, Tensor]]]()
        for row, place in enumerate(texts.places):
            own, levels = slice(row, row + 1), texts.first(levels_below(place, tree.level_count))
            for stop in range(step, count + 1, step):
                nodes = tokens[own, stop - step : stop], depths[own, :stop], ancestors[own, :stop, :stop]
                inputs, buffers = PartInputs(*nodes, roots[own], blocks, levels), texts.buffers.parts(row)
                logits, features = _run(forward, self._over_slots, self._engine, inputs, buffers, row)
                caught = features.caught
                if self._engine is not None and rows * count > step:  # the graph will overwrite its outputs
                    logits, caught = logits.clone(), {layer: part.clone() for layer, part in caught.items()}
                read.append((logits, caught))

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=1).view(rows, count, -1) if len(parts) > 1 else parts[0]

        caught = {layer: joined([states[layer] for _, states in read]) for layer in read[0][1]}
        return joined([logits for logits, _ in read]), Features(forward.layers, caught)


def doubled(count: int) -> int:
    """Round a number of slots up to a power of two, to have few sizes, since a graph is captured for each."""
    return max(1 << (count - 1).bit_length(), WINDOW)


def _tried(rows: int) -> tuple[int, ...]:
    """Return lengths of chains that check compiled code for `rows` rows; the longest is as long as a prompt chunk."""
    largest = _CHUNK // rows // 16 * 16
    return (*_TRIED, *((largest - 28, largest) if largest > _TRIED[-1] else ()))


class TextReader:
    """Prefills prompts as chains by `steps`; `is_compiled` says whether trees run compiled, as prompts need not."""

    def __init__(self, steps: InvariantSteps, is_compiled: bool) -> None:
        self._steps, self._is_compiled = steps, is_compiled

    def read(self, tokens: Tensor, chunk_size: int | None) -> tuple[Tensor, list[Features]]:
        """Prefill with `tokens` `[b, t]`, the last ones of the prompt, in chunks of at most `chunk_size` tokens."""
        steps, ends, rows = self._steps, self._steps.texts.rows, len(tokens)
        orders = [order.to(ends.device) for order in steps.texts.orders(ends.prompt_length)]
        tokens = tokens.to(ends.device)
        positions = ends.positions.expand(*ends.positions.shape[:-2], rows, -1)
        largest, together = _CHUNK if steps.engine is None else _tried(rows)[-1], [slice(None)]
        if steps.needs.is_exact:
            largest, together = steps.needs.forward, [slice(row, row + 1) for row in range(rows)]
        logits, caught = list[Tensor](), list[dict[int, Tensor]]()
        for own in together:
            prompt = _PromptTexts(tokens[own], positions[..., own, :], orders[own], ends.length, own.start)
            last_logits, states = self._read_all(prompt, min(chunk_size or largest, largest))
            logits += last_logits
            caught.append(states)
        ends.slots.extend([ends.prompt_length - ends.length] * rows)
        if self._is_compiled:
            steps.forward.stop_catching()
        joined = {layer: torch.cat([states[layer] for states in caught]) for layer in caught[0]}
        return torch.stack(logits), [Features(steps.forward.layers, joined)]

    def _read_all(self, prompt: "_PromptTexts", size: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Read a prompt's rows in chunks; return each row's last logits `[1, v]` and the features `[b, length, h]`."""
        logits: list[Tensor] = [torch.empty(0)] * len(prompt.counts)
        read = [self.read_chunk(prompt, start, size, logits) for start in range(0, max(prompt.counts), size)]
        joined = {layer: torch.cat([caught[layer] for caught in read], dim=1) for layer in read[0]}
        return logits, {layer: prompt.padded(states) for layer, states in joined.items()}

    def read_chunk(self, prompt: "_PromptTexts", start: int, size: int, logits: list[Tensor]) -> dict[int, Tensor]:
        """Read a chunk of each row; return features, and set `logits[row]` `[1, v]` if the row's prompt ends in it."""
        steps, rows = self._steps, len(prompt.counts)
        steps.check_code(rows, prompt.tokens[0])
        width = min(size, prompt.tokens.shape[1] - start)
        count = steps.count(width, rows)
        read = torch.arange(count)
        chosen = start + read.clamp(max=width - 1)
        left = torch.tensor(prompt.counts)[:, None] - start
        roots = torch.tensor(prompt.starts)[:, None] + start + left.clamp(max=0)
        depths = torch.minimum(read, (left - 1).clamp(min=0))
        ends = {row: end - 1 - start for row, end in enumerate(prompt.counts) if start < end <= start + width}
        asked = sorted(set(ends.values()))
        others = [node for node in range(count) if node not in asked]
        kept = asked + others[: rounded_up(max(len(asked), 2), steps.step(rows)) - len(asked)]
        end, layout = int(roots.max()) + count, steps.layout(roots, depths, count)
        of_nodes = [depths, roots, torch.tensor(kept), *layout]
        if steps.texts.rows.device.type != "cpu":
            chosen, *of_nodes = moved([chosen, *of_nodes], steps.texts.rows.device)
        depths, roots, chosen_logits, *parts = of_nodes
        positions = prompt.positions[..., chosen].view(-1, *depths.shape).permute(1, 2, 0)
        inputs = InvariantInputs(prompt.tokens[:, chosen], depths, roots, positions, chosen_logits)
        steps.texts.reserve(max(end, layout.shared.numel()))
        chunk_logits, features = steps.run((*inputs, *parts), steps.texts.buffers.parts(prompt.row))
        for row, end in ends.items():
            logits[row] = chunk_logits[row, kept.index(end)][None]
        return {layer: part[:, :width] for layer, part in features.caught.items()}


class _PromptTexts:
    """The tokens of each row's prompt that the cache does not hold yet, without padding.

    `tokens` `[b, any]` are the last tokens of the padded prompts, at least all uncached ones. `position_ids`,
    `[b or 1, s]` or `[planes, b or 1, s]`, cover the prompts' s positions; the first `known` are cached. `orders`
    lists for each row the positions without padding. `row` selects the only row to write, if it is not `None`.
    """

    def __init__(
        self, tokens: Tensor, position_ids: Tensor, orders: list[Tensor], known: int, row: int | None = None
    ) -> None:
        self.row, self.length = row, position_ids.shape[-1] - known  # uncached positions, with padding
        self._orders = [order[order >= known] for order in orders]
        self.counts = list(map(len, self._orders))  # uncached tokens of each row, from `starts` on
        self.starts = [len(order) - count for order, count in zip(orders, self.counts, strict=True)]
        longest = torch.arange(max(self.counts), device=tokens.device)
        index = torch.stack([order[longest.clamp(max=len(order) - 1)] for order in self._orders])
        # `[b, t]` and `[..., b, t]`; a row with fewer tokens repeats its last one
        self.tokens = tokens.gather(1, index - (position_ids.shape[-1] - tokens.shape[1]))
        self.positions = position_ids.expand(*position_ids.shape[:-2], len(tokens), -1).gather(
            -1, index.expand(*position_ids.shape[:-2], -1, -1)
        )
        self._known = known

    def padded(self, states: Tensor) -> Tensor:
        """Spread the tokens' states `[b, t or more, h]` over the positions of the padded prompts: `[b, length, h]`."""
        places = torch.arange(self._known, self._known + self.length, device=states.device)
        index = torch.stack([torch.searchsorted(order, places, right=True) for order in self._orders]) - 1
        return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
