"""Draft sources, which a user passes as `assistant_model`. A source lives between calls and makes their drafters."""

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
        verifier: the call's verifier, for a source that attends to the target's cache.
        rows: number of texts that are decoded together.
        text_mask: `[b, s]`, 0 where the prompt is padding, over positions with known tokens; `None` without padding.
        paired_mask: the same over positions with known features.
        origins: for each row, source tokens of its text, such as an encoder's input; `None` for none.
        never_drafted: tokens that must not be drafted, such as placeholders of an image.
        engines: lend compiled code; `None` if nothing runs compiled.
        ends: closed at the end of the call, and then returns what the drafter borrowed.
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
        """Borrow the engine of `source`, which drafts as `model`, until the call ends; `None` if there is none."""
        return None if self.engines is None else self.ends.enter_context(self.engines.borrow(source, model))


class DraftSource(ABC):
    """Proposes tokens for a target: makes a `Drafter` for each call.

    Attributes:
        feature_layers: indices of the target's hidden states that it reads, 0 for the embeddings; empty for none.
        before_deepstack: whether it reads these hidden states before image features are added to them.
        reads_target: whether it attends to the target's cache, and reads only the newest features.
        calls_generate: whether drafting may call the target's `generate`, which must then decode without drafts.
    """

    before_deepstack: bool = False
    calls_generate: bool = False
    reads_target: bool = False

    @property
    def feature_layers(self) -> list[int]:
        return []

    @property
    def own_modules(self) -> list[nn.Module]:
        """Modules of the source itself, without the target's."""
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
        """Return a hash of its weights: 16 hexadecimal digits."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the source in files that were trained or measured with it."""

    @abstractmethod
    def drafter(self, call: DraftCall) -> Drafter:
        """Make the drafter of one call.

        Raises:
            ValueError: the source cannot draft for this call.
        """


class LevelSource(DraftSource):
    """A source that runs a draft model: `bind` makes the `StepModel` that drafts for a target."""

    @abstractmethod
    def check_target(self, target: PreTrainedModel) -> None:
        """Check that the source was made for this target.

        Raises:
            ValueError: it was made for another target; the message names both, and what differs.
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
    """One way to interpret a source's files: its fields are arguments of `from_pretrained` of the class `loader`."""

    loader: ClassVar[str]

    @property
    @abstractmethod
    def told(self) -> dict[str, str]:
        """Names and values of the fields, as words for a table."""


class TrainableSource(LevelSource):
    """A source that can be trained: a module with weights of its own, which uses further weights of its target.

    Attributes:
        vocab_size: size of the target's vocabulary.
        target: known parts of its target's identity, see `target_identity`.
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

        Args:
            target: the model to draft for.
            forward: computes passes in training: the module itself, or a wrapper of it. `None` computes them with
                packed copies of the weights.
        """

    @property
    @abstractmethod
    def draft_token_ids(self) -> Tensor:
        """Target ids of the tokens that it can propose, `[d]`, ascending."""

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
            draft_token_ids: target ids of the tokens that it can propose, `[d]`; `None` for all.
            levels: number of consecutive tokens that it drafts in training.
            fields: fields of its config.
        """

    @abstractmethod
    def plain_card(self, repo_id: str) -> str:
        """Return a model card for a repository without one: what the source is, its target, and how to load it."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the source to a folder, created if missing, for `from_pretrained`."""

    @abstractmethod
    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        """Load the weights that `save_pretrained` wrote during training.

        Raises:
            ValueError: the folder is of a module with other sizes or settings.
        """

    def whole(self, target: PreTrainedModel) -> Self:
        """Return the source with all weights of its files, also weights that it normally takes from its target."""
        return self

    @abstractmethod
    def readings(self, target: PreTrainedModel, whole: Self, *, has_images: bool) -> Iterator[FileReading]:
        """Yield ways to interpret the files of `whole`: first the configured one, then others that fit the target."""

    @abstractmethod
    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: Self) -> Self:
        """Return the source as another `reading` interprets its files; it shares the weights of `whole`."""
