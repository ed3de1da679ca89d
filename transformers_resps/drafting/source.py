"""Draft sources, which a user passes as `assistant_model`. A source outlives calls, and makes a drafter for each."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import input_embedding
from ..tree import TreeShape
from ..verifying.verifier import Verifier
from .drafter import Drafter
from .engine import DraftEngines
from .model_drafter import ModelDrafter
from .step_model import StepModel, TrainableModel


@dataclass(frozen=True)
class DraftCall:
    """Describes a call of `generate` to the source, which makes a drafter for this call."""

    target: PreTrainedModel
    verifier: Verifier | None = None  # the call's verifier, for a source that attends to the target's cache
    rows: int = 1  # number of texts that are decoded together
    text_mask: Tensor | None = None  # [b, s], 0 where a token of the prompt is padding; `None` without padding
    paired_mask: Tensor | None = None  # the same, only for positions whose target features are available
    origins: list[list[int]] | None = None  # for each row, input outside its text, such as an encoder's; `None`: none
    never_drafted: frozenset[int] = frozenset()  # tokens that must not be drafted, such as placeholders of an image
    engines: DraftEngines | None = None  # hold the compiled code of each source; `None`: run eagerly
    waits: bool = True  # whether the call waits for a compiler
    ends: ExitStack = field(default_factory=ExitStack)  # closed when the call ends: releases what drafters reserved


class DraftSource(ABC):
    """Proposes tokens for a target: makes a `Drafter` for each call."""

    before_deepstack: bool = False  # whether it reads hidden states before image features are added to them
    calls_generate: bool = False  # whether drafting may call the target's `generate`; such a call does not draft
    needs_compiled: bool = False  # whether it can draft only if the target's steps run compiled
    is_rounded: bool = True  # whether compiled drafts may read int8 weights: faster, but sometimes other tokens
    reads_target: bool = False  # whether it attends to the target's cache, and so needs only the newest features

    @property
    def feature_layers(self) -> list[int]:
        """Indices of the target's hidden states that the source reads, 0 for the embeddings; empty for none."""
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
        """Raise a `ValueError` if the source cannot draft for the target now. `generate` calls this first."""
        return None

    def fingerprint(self) -> str:
        """Return a hash of the source's weights: 16 hexadecimal digits, all 0 without weights."""
        return "0" * 16

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the source, for files with policies or measurements that depend on it."""

    @abstractmethod
    def drafter(self, call: DraftCall) -> Drafter:
        """Make the drafter of one call; raise a `ValueError` if the source cannot draft for this call."""


class LevelSource(DraftSource):
    """A source that drafts with a draft model. `bind` returns this model for a target."""

    @abstractmethod
    def check_target(self, target: PreTrainedModel) -> None:
        """Raise a `ValueError` if the source was made for another target. Its message says how both targets differ."""

    @abstractmethod
    def bind(self, target: PreTrainedModel) -> StepModel:
        """Return the model that drafts for `target`. Raises the errors of `prepare`."""

    def prepare(self, target: PreTrainedModel) -> None:
        self.check_target(target)

    def drafter(self, call: DraftCall) -> ModelDrafter:
        model = self.bind(call.target)
        mask, layers = call.paired_mask if model.reads_features else call.text_mask, self.feature_layers
        engine = None
        if call.engines is not None:
            lent = call.engines.borrow(self, model, waits=call.waits, rounds=self.is_rounded)
            engine = call.ends.enter_context(lent)
        return ModelDrafter(model, call.rows, mask, engine, call.verifier, feature_layers=layers)


@dataclass(frozen=True, slots=True)
class FileReading(ABC):
    """One interpretation of a source's files. The fields are arguments for `from_pretrained` of the class `loader`."""

    loader: ClassVar[str]

    @property
    @abstractmethod
    def told(self) -> dict[str, str]:
        """Names and values of the fields, in words, for a table that users read."""


class TrainableSource(LevelSource):
    """Source that can be trained: a module with its own weights, which also uses some weights of its target."""

    target: dict[str, Any]  # the target for which it was made, as far as its files say; see `target_identity`
    depths: int = 1  # number of layers that draft one level each; 1 if one layer drafts any number of levels

    def prepare(self, target: PreTrainedModel) -> None:
        super().prepare(target)
        own, table = next(cast(nn.Module, self).parameters()).device, input_embedding(target)
        if table.weight.device != own and not hasattr(table, "_hf_hook"):
            raise ValueError(
                f"The head is on {own}, but the target's embedding is on {table.weight.device}. "
                f"Call `head.to('{table.weight.device}')`, or load the head with `target=model`."
            )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""

    @abstractmethod
    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> TrainableModel:
        """Return the model that drafts for `target`, see `LevelSource.bind`.

        `forward` computes the forward passes in training: it is the module itself, or a wrapper of it. If it is
        `None`, as in generation, the passes read copies of the weights in a faster (packed) layout.
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
        """Make an untrained source for `target`, with `fields` of its config.

        `draft_token_ids` `[d]`, in the target's vocabulary, are the tokens that it can propose; `None` for all. In
        training it drafts `levels` consecutive tokens.
        """

    @abstractmethod
    def plain_card(self, repo_id: str) -> str:
        """Return a model card for a repository that has none: it describes the source, its target, and its loading."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the source to a folder, created if missing, for `from_pretrained`."""

    @abstractmethod
    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        """Load weights that `save_pretrained` wrote; raise a `ValueError` if sizes or settings differ."""

    def whole(self, target: PreTrainedModel) -> Self:
        """Return `self` or, if it omits some weights of its files, a new source with all weights."""
        return self

    @abstractmethod
    def readings(self, target: PreTrainedModel, whole: Self, *, has_images: bool) -> Iterator[FileReading]:
        """Yield interpretations of the files of `whole`: first the configured one, then others that fit the target."""

    @abstractmethod
    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: Self) -> Self:
        """Return a source that interprets the files as `reading` says, and shares the weights of `whole`."""
