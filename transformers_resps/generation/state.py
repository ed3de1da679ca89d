"""What an attached model keeps from call to call: defaults, what policies learned, named heads, compiled code."""

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel

from ..drafting.engine import DraftEngines
from ..heads import DraftHead
from ..policies.auto import PolicyCache
from ..verifying.slots import SlotEngine
from .checks import check_tree_attention
from .request import SpeculationDefaults


class NamedHeads:
    """The heads of one target that calls named by a folder or a Hub id, each loaded once."""

    def __init__(self) -> None:
        self._heads: dict[Hashable, DraftHead] = {}

    def load(self, name: str | os.PathLike[str], target: PreTrainedModel) -> DraftHead:
        """The head, on the target's device and in its dtype.

        Raises:
            ValueError, OSError: as `DraftHead.from_pretrained`.
        """
        key = os.fspath(name), target.device, target.dtype
        if key not in self._heads:
            self._heads[key] = DraftHead.from_pretrained(name, target=target)
        return self._heads[key]


class EvaluationMode:
    """Takes layers out of training mode while calls run, and puts them back after the last one.

    Calls of several threads may overlap: none may train a layer that another one still runs.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls = 0
        self._training: list[Module] = []

    @contextmanager
    def held(self, *models: Any) -> Iterator[None]:
        """Keep all layers of `models` in evaluation mode inside the `with` block; `None` is skipped."""
        with self._lock:
            self._calls += 1
            modules = [module for model in models if model is not None for module in model.modules()]
            self._training += [module for module in modules if module.training]
            for module in modules:
                module.training = False
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    for module in self._training:
                        module.training = True
                    self._training.clear()


class SpeculationState:
    """All that a model keeps for speculation. `attach` gives it, `detach` takes it away whole.

    A copied or pickled model keeps its defaults, and starts anew with everything else.

    Attributes:
        defaults: what `attach` was given.
        policy_cache: what "auto", and policies that calls named, have learned on this model.
        named_heads: the heads that calls named.
        evaluation_mode: of the model's layers and its heads', for `eval_mode`.
        slot_engine: the buffers and the compiled code of this model.
        draft_engines: the captured or compiled drafts of its heads, each as long as the head lives.
    """

    def __init__(self, defaults: SpeculationDefaults | None = None) -> None:
        self.defaults = defaults or SpeculationDefaults()
        self.policy_cache = PolicyCache()
        self.named_heads = NamedHeads()
        self.evaluation_mode = EvaluationMode()
        self.slot_engine = SlotEngine()
        self.draft_engines = DraftEngines()
        self._has_verified_trees = False

    def check_trees(self, model: PreTrainedModel) -> None:
        """Check, once, that the model can verify a draft tree; see `check_tree_attention`."""
        if not self._has_verified_trees:
            check_tree_attention(model)
            self._has_verified_trees = True

    def __reduce__(self) -> tuple[type["SpeculationState"], tuple[SpeculationDefaults]]:
        return SpeculationState, (self.defaults,)
