"""Sources: what a user passes as `assistant_model`. One lives between calls, and makes the drafter of each."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tree import TreeShape
from ..verifying.verifier import Verifier
from .drafter import Drafter
from .engine import DraftEngine, DraftEngines
from .model_drafter import ModelDrafter
from .step_model import StepModel, TrainableModel


@dataclass(frozen=True)
class DraftCall:
    """The call that a drafter is made for.

    Attributes:
        target: the model that is drafted for.
        verifier: the call's, for a source that attends to the target's entries.
        rows: number of texts that are decoded together.
        text_mask: `[b, s]`, 0 where the prompt is padding, over positions whose tokens are known; `None` where nothing
            is padded.
        paired_mask: the same over positions whose features are known.
        origins: for each row the tokens that its text is written from, such as an encoder's; `None` for none.
        never_drafted: tokens that stand for something else, such as an image.
        engines: lend compiled code; `None` where nothing runs compiled.
        ends: closed at the end of the call; gives back what a drafter borrows.
    """

    target: PreTrainedModel
    verifier: Verifier | None = None
    rows: int = 1
    text_mask: Tensor | None = None
    paired_mask: Tensor | None = None
    origins: list[list[int]] | None = None
    never_drafted: frozenset[int] = frozenset()
    engines: DraftEngines | None = None
    ends: ExitStack = field(default_factory=ExitStack)

    def engine(self, source: "DraftSource", model: StepModel) -> DraftEngine | None:
        """Borrow an engine for a source that drafts as `model`, until the call ends."""
        return None if self.engines is None else self.ends.enter_context(self.engines.borrow(source, model))


class DraftSource(ABC):
    """Drafts for a target.

    Attributes:
        feature_layers: the target's hidden states that it reads, by index, 0 being the embeddings; empty for none.
        before_deepstack: whether these are read before image features are added to them.
        reads_target: whether it attends to the target's entries, and reads the newest features alone.
        calls_generate: whether drafting may call `generate` of the target, which is then plain.
    """

    before_deepstack: bool = False
    calls_generate: bool = False
    reads_target: bool = False

    @property
    def feature_layers(self) -> list[int]:
        return []

    @property
    def own_modules(self) -> list[nn.Module]:
        """Modules of its own."""
        return [self] if isinstance(self, nn.Module) else []

    @property
    @abstractmethod
    def default_shape(self) -> TreeShape:
        """Tree that is used when `generate` gets no policy."""

    def prepare(self, target: PreTrainedModel) -> None:
        """Refuse, before any work, a target that it cannot draft for as both are now.

        Raises:
            ValueError: it belongs to another target, or is on another device.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash its weights: 16 hexadecimal digits."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identify the source, for files that are trained or measured with it: JSON values."""

    @abstractmethod
    def drafter(self, call: DraftCall) -> Drafter:
        """Make the drafter of one call.

        Raises:
            ValueError: it cannot draft for such a call.
        """


class LevelSource(DraftSource):
    """A source that goes level by level: bound to a target it is a `StepModel`."""

    @abstractmethod
    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target that it was not made for.

        Raises:
            ValueError: names both models, and what differs.
        """

    @abstractmethod
    def bind(self, target: PreTrainedModel) -> StepModel:
        """Bind the source to a target that it drafts for.

        Raises:
            ValueError: it belongs to another target, or is on another device.
        """

    def prepare(self, target: PreTrainedModel) -> None:
        self.check_target(target)

    def drafter(self, call: DraftCall) -> ModelDrafter:
        model = self.bind(call.target)
        mask, layers = call.paired_mask if model.reads_features else call.text_mask, self.feature_layers
        return ModelDrafter(model, call.rows, mask, call.engine(self, model), call.verifier, feature_layers=layers)


@dataclass(frozen=True, slots=True)
class FileReading(ABC):
    """One way to read the file of a source: its fields are overrides of `loader.from_pretrained`."""

    loader: ClassVar[str]

    @property
    @abstractmethod
    def told(self) -> dict[str, str]:
        """Name and value of each field in a table."""


class TrainableSource(LevelSource):
    """A module with weights of its own, which borrows the rest from its target.

    Attributes:
        vocab_size: tokens of its target.
        target: known parts of its target's identity, see `target_identity`.
        depths: number of layers that draft a level each; 1 drafts any number of levels.
    """

    target: dict[str, Any]
    depths: int = 1

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> TrainableModel:
        """Bind the source to a target that it drafts for, see `LevelSource.bind`.

        Args:
            target: the model that it drafts for.
            forward: computes a pass in place of packed copies of the weights: the module itself, or what training
                wraps it in.
        """

    @property
    @abstractmethod
    def draft_token_ids(self) -> Tensor:
        """Target ids of the tokens that it can propose, `[d]`, ascending."""

    @property
    @abstractmethod
    def output_heads(self) -> list[nn.Module]:
        """Output heads of its own; empty where it borrows the target's."""

    @classmethod
    @abstractmethod
    def untrained(cls, target: PreTrainedModel, draft_token_ids: Tensor | None, levels: int, **fields: Any) -> Self:
        """Make a new one for `target`, which is to be trained over so many levels.

        Args:
            target: the model that it drafts for.
            draft_token_ids: target ids of the tokens that it can propose, `[d]`; `None` for all.
            levels: tokens that it drafts one after the other in training.
            fields: of its config.
        """

    @abstractmethod
    def plain_card(self, repo_id: str) -> str:
        """Write a card for a repository that has none: what it is, its target, and how to load it."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write it to a folder, made if missing, from which `from_pretrained` reads it."""

    @abstractmethod
    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        """Take the weights that `save_pretrained` wrote while it was trained.

        Raises:
            ValueError: they are of a module with other sizes or settings.
        """

    def whole(self, target: PreTrainedModel) -> Self:
        """Load all that its files hold, also weights that it borrows from its target instead."""
        return self

    @abstractmethod
    def readings(self, target: PreTrainedModel, whole: Self, *, has_images: bool) -> Iterator[FileReading]:
        """Yield the configured reading of the `whole` source, then the others that this target has layers for."""

    @abstractmethod
    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: Self) -> Self:
        """Make the source by another reading, with the weights of the `whole` one, shared and not copied."""
