"""Drafts with a model of its own, level by level or by blocks, for one call of `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tree import CandidatePool
from ..verifying.verifier import Verifier
from .blocks import BlockDraft, BlockModel
from .drafter import Committed, Drafter, DraftRequest
from .engine import DraftEngine
from .passes import Draft, LevelDraft, read
from .pool_growth import Root
from .step_model import StepModel
from .text import DraftText


class ModelDrafter(Drafter):
    """Drafts candidate pools with one model.

    Args:
        model: drafts for the call's target.
        batch_size: rows decoded together.
        prompt_mask: `[b, s]`, 0 where the prompt is padding, of the positions that it reads: those whose features it
            gets, or all tokens; `None` when there is none.
        engine: lent to this call; `None` drafts without compiled code.
        verifier: of the call, for a model that attends to what the target keeps.
        feature_layers: see `Drafter`.
    """

    def __init__(
        self,
        model: StepModel,
        batch_size: int,
        prompt_mask: Tensor | None,
        engine: DraftEngine | None = None,
        verifier: Verifier | None = None,
        *,
        feature_layers: Sequence[int] = (),
    ) -> None:
        self._model, self._engine, self.feature_layers = model, engine, feature_layers
        self.proposable_tokens = model.proposable_tokens
        self.drafts_at_once = isinstance(model, BlockModel)
        self.most_levels = model.most_levels
        cache = model.cache(verifier) if engine is None else engine.cache(batch_size)
        self._text = DraftText(model, cache, batch_size, prompt_mask)
        self._root: Root | None = None  # of the tokens that were read last

    @property
    def waiting(self) -> int:
        """Committed tokens that have not been read."""
        return self._text.waiting

    def observe(self, committed: Committed) -> None:
        """Take in committed tokens. They are read when a draft needs them or enough of them wait, so plain steps cost
        the model almost nothing.
        """
        self._text.add(committed)

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """Draft below the newest token, see `Drafter.draft`."""
        draft: Draft[Any]
        if isinstance(self._model, BlockModel):
            draft = BlockDraft(self._model, request.shape)
        else:
            draft = LevelDraft(self._model, request.shape, request.goes_on)
        pairs, text = self._text.take(draft.ahead, draft.tree_room)
        self.built_tree = None
        if self._engine is None:
            self._root, pool = draft(pairs, text, self._root)
        else:
            self._root, pool, self.built_tree = self._engine.draft(draft, pairs, text, self._root)
        return pool

    def read(self, at_least: int = 1) -> None:
        """Extend the cache by the tokens committed since it was last read, in one pass, if `at_least` wait.

        Without features the tokens of a text may all wait: who does not ask for a draft pays for no reading.
        """
        if self.waiting >= at_least and (at_least == 1 or self._model.reads_features):
            pairs, text = self._text.take()
            if pairs is not None:
                self._root = read(self._model, pairs, text, self._root)

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def keep_rows(self, rows: list[int]) -> None:
        order = torch.tensor(rows, device=self._model.device)  # one write
        self._text.keep_rows(rows, order)
        self._root = None if self._root is None else self._root.of_rows(order)
