"""The drafter that runs a draft model during one call of `generate`: once per level, or once over a block."""

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
    """Drafts candidate pools with one draft model for `batch_size` texts; for `prompt_mask` see `DraftText`.

    `engine` runs compiled code, and is reserved for this call; `None` drafts without compiled code. A model that
    attends to the target's cache needs the `verifier`.
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
        self._root: Root | None = None  # results for the tokens that the model processed last

    def observe(self, committed: Committed) -> None:
        """Queue committed tokens. The model processes them before a draft or in `read`, so plain steps cost little."""
        self._text.add(committed)

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
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
        """Process all queued tokens in one pass, if there are at least `at_least`."""
        # Tokens without features wait for a draft: they take little memory, and without a draft a pass is wasted.
        if self._text.waiting >= at_least and (at_least == 1 or self._model.reads_features):
            pairs, text = self._text.take()
            if pairs is not None:
                self._root = read(self._model, pairs, text, self._root)

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def keep_rows(self, rows: list[int]) -> None:
        order = torch.tensor(rows, device=self._model.device)  # one copy to the device
        self._text.keep_rows(rows, order)
        self._root = None if self._root is None else self._root.of_rows(order)
