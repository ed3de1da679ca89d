"""Draft sources, which a user passes as `assistant_model`. A source exists between calls, and makes their drafters."""

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
    """Describes a call of `generate` to the source that makes its drafter.

    Attributes:
        target: the model that is drafted for.
        verifier: the call's verifier, for a source that attends to the target's cache.
        rows: number of texts that are decoded together.
        text_mask: `[b, s]`, 0 where the prompt is padding, for the positions of all tokens; `None` without padding.
        paired_mask: like `text_mask`, but only for the positions whose target features are available.
        origins: for each row, input tokens outside its text, such as an encoder's input; `None` for none.
        never_drafted: tokens that must not be drafted, such as placeholders of an image.
        engines: hold the compiled code of each source; `None` if nothing runs compiled.
        ends: a stack that is closed at the end of the call, and then releases the engine used by the drafter.
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
        """Reserve the engine of `source` until the call ends; `None` if none is free. `model` is the bound source."""
        return None if self.engines is None else self.ends.enter_context(self.engines.borrow(source, model))


class DraftSource(ABC):
    """Proposes tokens for a target: makes a `Drafter` for each call.

    Attributes:
        feature_layers: indices of the target's hidden states that it reads, 0 for the embeddings; empty for none.
        before_deepstack: whether it reads these hidden states before image features are added to them.
        reads_target: whether it attends to the target's cache, and reads the features of the newest token only.
        calls_generate: whether drafting may call the target's `generate`; such an inner call must not draft itself.
    """

    before_deepstack: bool = False
    calls_generate: bool = False
    reads_target: bool = False

    @property
    def feature_layers(self) -> list[int]:
        return []

    @property
    def own_modules(self) -> list[nn.Module]:
        """Modules that belong to the source itself, not to the target."""
        return [self] if isinstance(self, nn.Module) else []

    @property
    @abstractmethod
    def default_shape(self) -> TreeShape:
        """Tree shape that is used if `generate` gets no policy."""

    def prepare(self, target: PreTrainedModel) -> None:
        """Check, before any work of a call, that the source can draft for the target now.

        Raises:
            ValueError: the source was made for another target, or is on another device.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the source's weights: 16 hexadecimal digits."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the source, for files with policies or measurements that depend on it."""

    @abstractmethod
    def drafter(self, call: DraftCall) -> Drafter:
        """Make the drafter of one call.

        Raises:
            ValueError: the source cannot draft for this call.
        """


class LevelSource(DraftSource):
    """Source whose drafts are made by a draft model. `bind` returns this model for a target."""

    @abstractmethod
    def check_target(self, target: PreTrainedModel) -> None:
        """Check that the source was made for this target.

        Raises:
            ValueError: it was made for another target; the message names both targets and their differences.
        """

    @abstractmethod
    def bind(self, target: PreTrainedModel) -> StepModel:
        """Return the model that drafts for `target`.

        Raises:
            ValueError: the source was made for another target, or is on another device.
        """

    def prepare(self, target: PreTrainedModel) -> None:
        self.check_target(target)

    def drafter(self, call: DraftCall) -> ModelDrafter:
        model = self.bind(call.target)
        mask, layers = call.paired_mask if model.reads_features else call.text_mask, self.feature_layers
        return ModelDrafter(model, call.rows, mask, call.engine(self, model), call.verifier, feature_layers=layers)


@dataclass(frozen=True, slots=True)
class FileReading(ABC):
    """One interpretation of a source's files. Its fields are arguments of `from_pretrained` of the class `loader`."""

    loader: ClassVar[str]

    @property
    @abstractmethod
    def told(self) -> dict[str, str]:
        """Names and values of the fields, in words, for a table that users read."""


class TrainableSource(LevelSource):
    """Source that can be trained: a module with its own weights, which also uses some weights of its target.

    Attributes:
        vocab_size: size of the target's vocabulary.
        target: describes the target for which it was made, as far as its files say; see `target_identity`.
        depths: number of layers that draft one level each; 1 if one layer drafts any number of levels.
    """

    target: dict[str, Any]
    depths: int = 1

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> TrainableModel:
        """Return the model that drafts for `target`, see `LevelSource.bind`.

        `forward` computes the forward passes in training: it is the module itself, or a wrapper of it. If it is
        `None`, as in generation, packed copies of the weights compute them.
        """

    @property
    @abstractmethod
    def draft_token_ids(self) -> Tensor:
        """Ascending ids `[d]`, in the target's vocabulary, of the tokens that the source can propose."""

    @property
    @abstractmethod
    def output_heads(self) -> list[nn.Module]:
        """Output heads of the source itself; empty if it uses the target's."""

    @classmethod
    @abstractmethod
    def untrained(cls, target: PreTrainedModel, draft_token_ids: Tensor | None, levels: int, **fields: Any) -> Self:
        """Make an untrained source for `target`.

        Args:
            target: the model to draft for.
            draft_token_ids: ids `[d]`, in the target's vocabulary, of the tokens that it can propose; `None` for all.
            levels: number of consecutive tokens that it drafts in training.
            fields: fields of its config.
        """

    @abstractmethod
    def plain_card(self, repo_id: str) -> str:
        """Return a model card for a repository that has none: it describes the source, its target, and its loading."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the source to a folder, created if missing, for `from_pretrained`."""

    @abstractmethod
    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        """Load the weights that `save_pretrained` wrote during training.

        Raises:
            ValueError: the folder was written by a module with other sizes or settings.
        """

    def whole(self, target: PreTrainedModel) -> Self:
        """Return a copy that saves all of its weights, even those that it shares with its target."""
        return self

    @abstractmethod
    def readings(self, target: PreTrainedModel, whole: Self, *, has_images: bool) -> Iterator[FileReading]:
        """Yield interpretations of the files of `whole`: first the configured one, then others that fit the target."""

    @abstractmethod
    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: Self) -> Self:
        """Return a source that interprets the files as `reading` says, and shares the weights of `whole`."""
