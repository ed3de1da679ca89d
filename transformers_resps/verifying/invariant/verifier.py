"""Verify trees in the exact mode: the logits of a node are those of its text, whatever else is in the forward."""

import sys
from collections.abc import Sequence
from hashlib import sha256
from math import gcd
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...tree import DraftTree, Pricing, moved
from ..forward import Features, TargetForward
from ..prepacking import is_prepacked
from ..slots.buffers import SlotBuffers
from ..slots.engine import LEAST_ROWS, SlotEngine, padded_count
from ..slots.forwards import (
    node_positions,
)
from ..slots.verifier import _MORE, _WINDOW, SlotVerifier, _parts, _rounded_up, _windowed
from .attention import BLOCK, Layout, levels_below
from .forwards import InvariantForward, InvariantInputs, PartForward, PartInputs
from .row_classes import RowNeeds, kernel_settings


_CHUNK = 128  # tokens of a prompt that one forward reads; their results do not depend on it


_TRIED = (2, 3, 4, 5, 8, 17, 32, 48)  # lengths of the chains that try compiled code


_PLACE = 100  # tokens of the text before these chains


class InvariantVerifier(SlotVerifier):
    """Verifies trees so that the logits of a node are those of its text, whatever else is in the forward.

    The prompt is read over the same buffers, as a chain of tokens. A row's text begins at slot 0, without padding.
    Where kernels go by whole shapes, each forward has one number of nodes, of one row; larger trees take several.
    Compiled code on a CPU multiplies by kernels of ours, in which no row knows another.

    Args:
        forward: as in `Verifier`.
        engine: the target's. Where `compiles`, it is lent to this call.
        needs: rows that are computed together, as `RowClasses` finds them.
        position_ids: as in `Verifier`.
        attention_mask: as in `Verifier`.
        compiles: whether steps run compiled, and on a CPU the prompt.
    """

    _over_slots: InvariantForward

    def __init__(
        self,
        forward: TargetForward,
        engine: SlotEngine,
        needs: RowNeeds,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(forward, engine if compiles else None, position_ids, attention_mask)
        self._needs, self._pattern = needs, engine.pattern(forward.target)
        shared = engine.lock, needs.forward, forward.target, self._pattern
        self._compiles_all = compiles and not needs.is_exact
        self.pricing = Pricing(paths_cost=not self._compiles_all)  # to kernels of ours a path is some more rows
        self._eagerly = InvariantForward(*shared, [])
        self._over_chunks = InvariantForward(*shared, None if self._compiles_all else [])
        self._over_slots = self._over_chunks  # features are outputs of compiled code, else hooks catch them
        if needs.is_exact:
            self._over_slots = PartForward(*shared, forward.layers if compiles else [])
        self._fewest = LEAST_ROWS if is_prepacked(forward.target) else 1  # stock layers take longer for more rows
        self._hidden: list[int] = []  # of each row, positions of its prompt that are no text

    @property
    def _places(self) -> list[int]:
        return [end - hidden for end, hidden in zip(self._row_ends, self._hidden, strict=True)]

    def _orders(self, length: int) -> list[Tensor]:
        seen = self._slots.unpadded(length, len(self._shifts), torch.device("cpu"))
        return [row.nonzero().flatten() for row in seen]

    def _visible(self, size: int) -> Tensor:
        return torch.ones(self._rows, size, dtype=torch.bool, device=self.device)

    def _begin_steps(self) -> None:
        end = self._positions.shape[-1]
        self._hidden = [end - len(order) for order in self._orders(end)]
        self._buffers.clear()
        self._fill(end)

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: Any) -> tuple[Tensor, list[Features]]:
        """As `Verifier.prefill`. No chunk is larger than suits the machine."""
        self._start(len(tokens))
        orders = [order.to(self.device) for order in self._orders(self._positions.shape[-1])]
        tokens, positions = (
            tokens.to(self.device),
            self._positions.expand(*self._positions.shape[:-2], len(tokens), -1),
        )
        largest, together = _CHUNK, [slice(None)]
        if self._needs.is_exact:
            largest, together = self._needs.forward, [slice(row, row + 1) for row in range(len(tokens))]
        elif self._compiles_all:
            self._forward.stop_catching()  # see `SlotVerifier`
            largest = _tried(len(tokens))[-1]
        logits, caught = list[Tensor](), list[dict[int, Tensor]]()
        for rows in together:
            prompt = _PromptTexts(tokens[rows], positions[..., rows, :], orders[rows], self.length, rows.start)
            last_logits, states = self._read_all(prompt, min(chunk_size or largest, largest))
            logits += last_logits
            caught.append(states)
        self._slots.extend([positions.shape[-1] - self.length] * len(tokens))
        if self._engine is not None:
            self._forward.stop_catching()
        features = Features(self._forward.layers)
        features.caught = {layer: torch.cat([states[layer] for states in caught]) for layer in caught[0]}
        return torch.stack(logits), [features]

    def _read_all(self, prompt: "_PromptTexts", size: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Read rows in chunks: the last logits `[1, v]` of each, and the features `[b, length, h]`."""
        logits: list[Tensor] = [torch.empty(0)] * len(prompt.counts)
        read = [self._read(prompt, start, size, logits) for start in range(0, max(prompt.counts), size)]
        joined = {layer: torch.cat([caught[layer] for caught in read], dim=1) for layer in read[0]}
        return logits, {layer: prompt.padded(states) for layer, states in joined.items()}

    def _read(self, prompt: "_PromptTexts", start: int, size: int, logits: list[Tensor]) -> dict[int, Tensor]:
        """Read each row's next tokens. Rows that end with them get their `logits` `[1, v]`. Returns the features."""
        width = min(size, prompt.tokens.shape[1] - start)
        if self._engine is not None and not self._engine.sample:
            self._engine.sample = prompt.tokens[0, : 2 * _PLACE].tolist()
        self._check_code(len(prompt.counts))
        step = self._step(len(prompt.counts))
        count = self._count(width, step)
        read = torch.arange(count)
        chosen = start + read.clamp(max=width - 1)
        left = torch.tensor(prompt.counts)[:, None] - start
        roots = torch.tensor(prompt.starts)[:, None] + start + left.clamp(max=0)
        depths = torch.minimum(read, (left - 1).clamp(min=0))
        ends = {row: end - 1 - start for row, end in enumerate(prompt.counts) if start < end <= start + width}
        asked = sorted(set(ends.values()))
        others = [node for node in range(count) if node not in asked]
        kept = asked + others[: _rounded_up(max(len(asked), 2), step) - len(asked)]
        end, layout = int(roots.max()) + count, self._layout(roots, depths, count)
        of_nodes = [depths, roots, torch.tensor(kept), *layout]
        if self.device.type != "cpu":
            chosen, *of_nodes = moved([chosen, *of_nodes], self.device)
        depths, roots, chosen_logits, *parts = of_nodes
        positions = prompt.positions[..., chosen].view(-1, *depths.shape).permute(1, 2, 0)
        inputs = InvariantInputs(prompt.tokens[:, chosen], depths, roots, positions, chosen_logits)
        self._reserve(max(end, layout.shared.numel()))
        chunk_logits, caught = self._run(self._over_chunks, (*inputs, *parts), self._buffers.parts(prompt.row))
        for row, end in ends.items():
            logits[row] = chunk_logits[row, kept.index(end)][None]
        return {layer: part[:, :width] for layer, part in caught.items()}

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        if self._needs.is_exact:
            self._note_least(self._needs.forward)
            logits, caught = self._in_parts(tree, self._needs.forward)
        else:
            is_chain = all(parents == [0, *range(tree.node_count - 1)] for parents in tree.parents.tolist())
            self._check_code(self._rows)
            step = self._step(self._rows)
            self._note_least(self._count(1, step))
            count = self._count(tree.node_count, step)
            nodes, depths, ancestors, roots = self._nodes(tree, count)
            layout = self._layout(self._newest_roots, depths, tree.node_count, None if is_chain else ancestors)
            positions = node_positions(roots[:, 1:], depths)
            inputs = nodes, depths, self._newest_roots, positions, self._first(count)
            self._reserve(max(max(self._places) + count, layout.shared.numel()))
            logits, caught = self._run(self._over_slots, (*inputs, *layout), self._buffers.parts())
        features = Features(self._forward.layers)
        features.caught = caught
        return self._without_padding(tree, logits, features)

    def _in_parts(self, tree: DraftTree, step: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Run forwards over `step` nodes of a row each; of a larger tree, those before them lie in their slots."""
        count = _rounded_up(tree.node_count, step)
        tokens, depths, ancestors, roots = self._nodes(tree, count)
        rows, blocks = len(tree.tokens), self._first(self._reserve(max(self._places) + count) // BLOCK)
        read = list[tuple[Tensor, dict[int, Tensor]]]()
        for row, place in enumerate(self._places):
            own, levels = slice(row, row + 1), self._first(levels_below(place, tree.level_count))
            for stop in range(step, count + 1, step):
                nodes = tokens[own, stop - step : stop], depths[own, :stop], ancestors[own, :stop, :stop]
                inputs = PartInputs(*nodes, roots[own], blocks, levels)
                logits, caught = self._run(self._over_slots, inputs, self._buffers.parts(row), row)
                if self._engine is not None and rows * count > step:  # a graph writes to the same place again
                    logits, caught = logits.clone(), {layer: part.clone() for layer, part in caught.items()}
                read.append((logits, caught))

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=1).view(rows, count, -1) if len(parts) > 1 else parts[0]

        features = {layer: joined([caught[layer] for _, caught in read]) for layer in read[0][1]}
        return joined([logits for logits, _ in read]), features

    def _count(self, nodes: int, step: int) -> int:
        """How many nodes a step computes of each row, padding included."""
        if not self._compiles_all:
            return _rounded_up(max(nodes, -(-self._fewest // self._rows)), step)
        count = _rounded_up(padded_count(self.device, nodes, self._rows), step)
        return count + step * (count == self._rows)  # what is equal at first is compiled as always equal

    def _layout(self, roots: Tensor, depths: Tensor, count: int, ancestors: Tensor | None = None) -> Layout:
        """The layout of a chain, or of a tree with `ancestors`; nodes from `count` on are padding."""
        least = 2 if self._compiles_all else 0
        if ancestors is None:
            layout = Layout.of_chain(roots, depths, least)
        else:
            layout = Layout.of_tree(roots, depths, ancestors, least)
        return layout.of_nodes(count, compiled=self._compiles_all)

    def _run(
        self, forward: InvariantForward, inputs: tuple[Tensor, ...], buffers: list[Tensor], row: int = 0
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run a forward: logits, and the features of each layer. `row` as in `SlotEngine.forward`.

        Raises:
            RuntimeError: it cannot be compiled. Without compilation it rounds otherwise.
        """
        if self._engine is None or forward is not self._over_slots:
            outputs, features = self._forward.catch(lambda: forward(inputs, buffers))
            return outputs[0], features.caught
        outputs = self._engine.forward(forward, inputs, buffers, row)
        if self._engine.is_broken:
            raise RuntimeError(
                f"The target's steps could not run compiled: {self._engine.obstacle}. As they are, they round "
                "otherwise, so call `generate` with `compile=False` to write a text in one way."
            )
        return outputs[0], forward.features(outputs, inputs, self._forward.layers)

    def _step(self, rows: int) -> int:
        """The number of which the nodes of each row must be a multiple."""
        return self._needs.forward // gcd(self._needs.forward, rows)

    def _check_code(self, rows: int) -> None:
        """Compare, once for each compiled code, nodes beside others, and with those of other code.

        Raises:
            ValueError: it rounds a node by the nodes beside it, or otherwise than what was compiled before.
        """
        if self._engine is None or not self._compiles_all:
            return
        engine, settings = self._engine, tuple(kernel_settings().values())
        code = rows, *settings
        if code in engine.checked:
            return
        with engine.preparing():
            *fewer, most = _tried(rows)
            buffers = self._trial_buffers(engine.sample, rows, most)
            known = self._answer(engine.sample, most, buffers, is_chain=True)
            answers = [self._answer(engine.sample, count, buffers, is_chain=True) for count in fewer]
            answers += [self._answer(engine.sample, count, buffers, is_chain=False) for count in _TRIED]
        if not all(torch.equal(logits, known[: len(logits)]) for logits in answers):
            self._refuse("a row by what stands beside it")
        bits = sha256(known[: _TRIED[-1]].contiguous().view(torch.uint8).numpy().tobytes()).digest()
        if engine.bits.setdefault(settings, bits) != bits:
            self._refuse("a text in several ways")
        engine.checked.add(code)

    def _trial_buffers(self, sample: Sequence[int], rows: int, count: int) -> list[Tensor]:
        """Buffers that hold the first tokens of a sample of text in each row, and take `count` more."""
        buffers = SlotBuffers()
        buffers.reserve(_parts(self._pattern), rows, _windowed(_PLACE + self._count(count, 1)) + _MORE)
        nodes = torch.arange(_PLACE).expand(rows, -1)
        inputs = self._trial_inputs(sample, nodes, 0)
        self._eagerly((*inputs, *Layout.of_chain(inputs.roots, nodes)), buffers.parts())
        return buffers.parts()

    def _answer(self, sample: Sequence[int], count: int, buffers: list[Tensor], *, is_chain: bool) -> Tensor:
        """The logits of compiled code to a chain of so many nodes, `[count, v]`, the same in each row."""
        rows = len(buffers[0])
        parents = (torch.arange(count) - 1).clamp(min=0).expand(rows, -1)
        tree = DraftTree.from_parents(torch.zeros_like(parents), parents).padded(self._count(count, 1))
        inputs = self._trial_inputs(sample, tree.depths, _PLACE)
        layout = self._layout(inputs.roots, tree.depths, count, None if is_chain else tree.ancestors)
        return self._run(self._over_slots, (*inputs, *layout), buffers)[0][0, :count]

    def _trial_inputs(self, sample: Sequence[int], depths: Tensor, place: int) -> InvariantInputs:
        """The inputs of tokens at `depths` `[b, n]` below a place; the sample repeats itself."""
        places = place + depths
        tokens = torch.tensor(sample)[places % len(sample)]
        last = sys.maxsize if self._last_position is None else self._last_position
        planes = torch.zeros_like(torch.tensor(self._shifts[0]))  # some targets count in floats
        positions = (places[..., None] + planes).clamp(max=last)
        return InvariantInputs(
            tokens, depths, torch.full((len(depths), 1), place), positions, self._first(depths.shape[1])
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{type(self._forward.target).__name__} rounds {what} when it runs compiled: only kernels of ours do not, "
            "in bfloat16, on CPUs with AVX512-BF16, in code that is kept. Call `generate` with `compile=False`."
        )

    def keep_rows(self, rows: list[int]) -> None:
        self._hidden = [self._hidden[row] for row in rows]
        super().keep_rows(rows)

    def _reserve(self, count: int) -> int:
        if not self._needs.is_exact:
            return super()._reserve(count)
        size = max(1 << (count - 1).bit_length(), _WINDOW)  # few sizes: each is captured by itself
        if size > self._buffers.size:
            self._buffers.grow(size)
        return size


def _tried(rows: int) -> tuple[int, ...]:
    """Lengths of the chains that try compiled code; the last ones are those of a part of a prompt."""
    largest = _CHUNK // rows // 16 * 16
    return (*_TRIED, *((largest - 28, largest) if largest > _TRIED[-1] else ()))


class _PromptTexts:
    """What is new of each row's prompt, without padding.

    Args:
        tokens: `[b, any]` the end of the prompts.
        position_ids: `[b or 1, s]`, or `[planes, b or 1, s]`, of the whole prompts.
        orders: of each row, which of the s are text, ascending.
        known: positions that the cache holds.
        row: of the buffers, if they are of one.

    Attributes:
        tokens: `[b, t]`; a row that has fewer repeats its last.
        positions: `[..., b, t]` of them.
        counts: new tokens of each row.
        starts: tokens of each row before them.
        length: new positions of the prompts, padding included.
    """

    def __init__(
        self, tokens: Tensor, position_ids: Tensor, orders: list[Tensor], known: int, row: int | None = None
    ) -> None:
        self.row, self.length = row, position_ids.shape[-1] - known
        self._orders = [order[order >= known] for order in orders]
        self.counts = list(map(len, self._orders))
        self.starts = [len(order) - count for order, count in zip(orders, self.counts, strict=True)]
        longest = torch.arange(max(self.counts), device=tokens.device)
        index = torch.stack([order[longest.clamp(max=len(order) - 1)] for order in self._orders])
        self.tokens = tokens.gather(1, index - (position_ids.shape[-1] - tokens.shape[1]))
        self.positions = position_ids.expand(*position_ids.shape[:-2], len(tokens), -1).gather(
            -1, index.expand(*position_ids.shape[:-2], -1, -1)
        )
        self._known = known

    def padded(self, states: Tensor) -> Tensor:
        """States `[b, t or more, h]` of the tokens, where they stand in the prompts: `[b, length, h]`."""
        places = torch.arange(self._known, self._known + self.length, device=states.device)
        index = torch.stack([torch.searchsorted(order, places, right=True) for order in self._orders]) - 1
        return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
