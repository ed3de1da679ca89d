"""Base class of drafters that use a model of Transformers."""

from abc import abstractmethod
from typing import Any, Self
from weakref import ref

from torch import nn
from transformers import PreTrainedModel

from ..drafting import LevelSource
from ..heads.identity import parameter_fingerprint, target_identity
from ..tree import TreeShape


class LoadedModel(LevelSource):
    """Drafts for `target` with `model`, held by a weak reference. Raises a `ValueError` if the two do not fit."""

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel) -> None:
        self._model = ref(model)
        self.check_target(target)

    @classmethod
    def of_model(cls, model: PreTrainedModel, target: PreTrainedModel) -> Self:
        return cls(model, target)

    @property
    def model(self) -> PreTrainedModel:
        """The model that drafts. Raises a `ReferenceError` if it has been deleted."""
        model = self._model()
        if model is None:
            raise ReferenceError("The assistant has been deleted. Keep the model that drafts, and pass it again.")
        return model

    @property
    def own_modules(self) -> list[nn.Module]:
        return [self.model]

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(16, 4, 4)

    @abstractmethod
    def _obstacle(self, target: PreTrainedModel) -> str | None:
        """Return why the model cannot draft for `target`, and what to do instead; `None` if it can."""

    def check_target(self, target: PreTrainedModel) -> None:
        model = self.model
        obstacle = self._obstacle(target)
        if obstacle is None and model.device != target.device:
            obstacle = f"is on {model.device}, and the target on {target.device}. Call `.to('{target.device}')` on it."
        if obstacle is not None:
            raise ValueError(f"The assistant {model.config.name_or_path or type(model).__name__} {obstacle}")

    def fingerprint(self) -> str:
        return parameter_fingerprint(self.model)

    def identity(self) -> dict[str, Any]:
        return target_identity(self.model) | {"fingerprint": self.fingerprint()}
