"""A source that fills a block of slots in one pass, and the pool of the paths through them.

DDTree (arXiv 2604.12989): a path scores the sum of its tokens' log probabilities, each from its own slot. No node that
ranks below the best B of its level is among the best B of all, so the best B of each level hold the tree.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tree import CandidatePool
from .drafter import DraftRequest
from .level_drafter import LevelDrafter
from .step_model import Entries, Places, StepModel


class BlockSlots(NamedTuple):
    """What a pass puts out at the slots that predict the next D tokens.

    Attributes:
        hidden: `[b, D, h]` the outputs that an output head multiplies.
        logits: `[b, D, d]` fp32.
        first: `[b, h]` the output at the root where another slot predicts the first token; `None` where it does.
    """

    hidden: Tensor
    logits: Tensor
    first: Tensor | None = None


class Children(NamedTuple):
    """The likeliest tokens after each node of a level.

    Attributes:
        tokens: `[b, 1 or w, k]` target ids.
        scores: `[b, 1 or w, k]` fp32 log probabilities.
        state: `[b, w, r]` what a correction knows of the path to each node; `None` where it needs the node alone.
    """

    tokens: Tensor
    scores: Tensor
    state: Tensor | None = None


# (a level, from 0 on; `[b, w]` target ids of the nodes that get children, at first the root; their state) -> children
Branching = Callable[[int, Tensor, Tensor | None], Children]


class BlockModel(StepModel):
    """A source of blocks as it drafts for one target.

    What it keeps of a text are keys and values of the positions whose features are known. The root comes after them.

    Attributes:
        block_levels: tokens that a block drafts at most.
        windows: of each layer, how many positions a slot sees, its own included; `None` for all.
        causal: of each layer, whether a slot sees no later one.
    """

    block_levels: int
    windows: Sequence[int | None]
    causal: Sequence[bool]

    @abstractmethod
    def width(self, levels: int) -> int:
        """Slots of a pass that drafts so many tokens, the root's included."""

    @abstractmethod
    def fill(
        self,
        newest: Tensor,
        root: Tensor,
        levels: int,
        places: Places,
        entries: Entries,
        masks: Sequence[Tensor | None],
    ) -> BlockSlots:
        """One pass over a block.

        Args:
            newest: `[b, 1, h]` what `run` gave of the newest tokens.
            root: `[b]` these.
            levels: tokens to predict.
            places: of the block's slots.
            entries: of the text, and room for the block's.
            masks: of each layer, `[b or 1, 1, q, s]` bool over the entries; `None` where each slot sees all.
        """

    def branching(self, slots: BlockSlots, top_k: int) -> Branching:
        """What grows a tree of at most `top_k` children per node from a block; what its levels share is done once.

        Here each slot is guessed apart, whatever the path to it.
        """
        scores, best = slots.logits.log_softmax(-1).topk(top_k, dim=-1)  # [b, D, k]
        tokens = self.target_ids(best)
        return lambda level, parents, state: Children(tokens[:, level, None], scores[:, level, None])

    def oldest_seen(self, length: int) -> int:
        """As `StepModel.oldest_seen`, but no position that a slot sees is forgotten."""
        if self.sliding_window is None:
            return 0
        stride = max(self.sliding_window // 16, 1)
        return max((length + 1 - self.sliding_window) // stride, 0) * stride


class BlockDrafter(LevelDrafter):
    """Drafts all levels with one pass of a `BlockModel`; see `LevelDrafter` for the arguments.

    A shape's `top_k` is the most children of a node. A level keeps as many nodes as the tree may have.
    """

    drafts_at_once = True
    _model: BlockModel

    def __init__(
        self, model: BlockModel, batch_size: int, prompt_mask: Tensor | None, *, feature_layers: Sequence[int] = ()
    ) -> None:
        super().__init__(model, batch_size, prompt_mask, feature_layers=feature_layers)
        self.most_levels = model.block_levels

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """As `Drafter.draft`. All levels come from one pass, so the policy is not asked whether to go on."""
        model, shape = self._model, request.shape
        levels = min(shape.depth, model.block_levels)
        count = model.width(levels)
        ahead, _ = self._read(ahead=count)
        length = self._slots.length
        self._cache.reserve(length, tree=count)
        entries = self._cache.attend_from(-count, None, end=length)
        root = input_ids[:, -1].to(self._device)
        slots = model.fill(self._newest, root, levels, self._places.at(ahead), entries, self._masks(count))
        most = max(shape.total_tokens - 1, 1)
        branch = model.branching(slots, min(shape.top_k, most, model.proposable_tokens))
        return block_pool(branch, root, levels, most)

    def _masks(self, count: int) -> list[Tensor | None]:
        """What the slots of a block see, of each layer: `[b or 1, 1, count, count + length]`, the block first."""
        model, length, device = self._model, self._slots.length, self._device
        text = self._slots.visible(length, device)
        kinds = list(zip(model.causal, model.windows, strict=True))
        made = {kind: self._mask_of(count, text, *kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def _mask_of(self, count: int, text: Tensor | None, is_causal: bool, window: int | None) -> Tensor | None:
        length, device = self._slots.length, self._device
        is_cut = window is not None and length + count > window
        if text is None and not is_causal and not is_cut:
            return None
        block = torch.ones(count, count, dtype=torch.bool, device=device)
        block = block.tril()[None] if is_causal else block[None]
        seen = torch.ones(1, 1, length, dtype=torch.bool, device=device) if text is None else text[:, None]
        if is_cut:
            assert window is not None
            order, own = torch.arange(length, device=device), torch.arange(count, device=device)[:, None]
            distances = self._slots.ends(device)[..., None] + own - order  # [b or 1, count, length]
            seen = seen & (distances < window)
        rows = max(len(seen), len(block))
        return torch.cat([block.expand(rows, -1, -1), seen.expand(rows, count, -1)], dim=-1)[:, None]


def block_pool(branch: Branching, root: Tensor, levels: int, most: int) -> CandidatePool:
    """The best `most` nodes of each level below the root `[b]`.

    Source: DDTree (arXiv 2604.12989); with corrections along each path DominoTree (arXiv 2607.08642), level by level.
    """
    parents, state = root[:, None], None
    above = torch.zeros(parents.shape, device=root.device)  # scores
    start = 0
    tokens, hung, scores, sizes = list[Tensor](), list[Tensor](), list[Tensor](), list[int]()
    for level in range(levels):
        found = branch(level, parents, state)
        width, count = parents.shape[1], found.scores.shape[-1]
        paths = (above[..., None] + found.scores).flatten(1)  # [b, w * k]
        above, best = paths.topk(min(most, paths.shape[1]), dim=-1)
        origin = best.div(count, rounding_mode="floor")
        parents = found.tokens.expand(-1, width, -1).flatten(1).gather(1, best)
        if found.state is not None:
            state = found.state.gather(1, origin[..., None].expand(-1, -1, found.state.shape[-1]))
        hung.append(origin + start if level else torch.full_like(origin, -1))
        start += width if level else 0
        tokens.append(parents)
        scores.append(above)
        sizes.append(above.shape[1])
    numbers = torch.arange(1, levels + 1).repeat_interleave(torch.tensor(sizes))
    return CandidatePool(torch.cat(tokens, dim=1), torch.cat(hung, dim=1), torch.cat(scores, dim=1), numbers)
