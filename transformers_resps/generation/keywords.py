"""The keywords that speculation adds to `generate`, a generation config and `attach`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from torch.nn import Module
from transformers import GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator

from ..compat import unwrapped
from ..drafting import DraftSource


AUTO: Literal["auto"] = "auto"  # `policy="auto"`: our default policy, which learns while it decodes
PLAIN: Literal["plain"] = "plain"  # `policy="plain"`: no drafting, whatever `attach` was given
MTP: Literal["mtp"] = "mtp"  # `assistant_model="mtp"`: the MTP layers in the target's checkpoint
USE_MTP = "use_mtp"  # Transformers' keyword for MTP layers
# Keywords that a `generation_config` may hold, and their types in JSON.
CONFIG_KEYWORDS: dict[str, type] = {"policy": str, "lockstep": bool, "invariant": bool}
# `compile=True` compiles at the first step; "auto" on a CPU compiles in another process while decoding goes on.
CompileChoice = bool | Literal["auto"]


def is_name(value: Any) -> bool:
    """Whether a value is the name of a folder or a Hub id: a string or path, but not the word "auto" or "plain"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO, PLAIN)


@dataclass(frozen=True, slots=True)
class Keywords:
    """The assistant and the keywords that speculation adds to `generate`. A keyword is `None` if it was not passed."""

    assistant_model: Any = None  # a source, its folder or Hub id, a list of them, or an assistant of Transformers
    policy: Any = None  # a policy, its folder or Hub id, "auto" or "plain"
    lockstep: bool | None = None  # whether the rows of a batch advance together
    compile: CompileChoice | None = None  # whether the target's steps run compiled
    invariant: bool | None = None  # whether the text is independent of the drafts, also in half precision

    @staticmethod
    def saved_in(config: GenerationConfig | None) -> "Keywords":
        """Read the keywords stored in a `generation_config`, which has no field for an `assistant_model`."""
        said = {name: getattr(config, name, None) for name in CONFIG_KEYWORDS}
        for name, kind in CONFIG_KEYWORDS.items():
            if not isinstance(said[name], kind | None):
                raise ValueError(
                    f"`generation_config.{name}` is saved as JSON, so it must be a {kind.__name__}, got a "
                    f"{type(said[name]).__name__}. Pass the object to `generate` or `attach` instead."
                )
        return Keywords(**said)

    @property
    def assistants(self) -> list[Any]:
        given = self.assistant_model
        return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]

    @property
    def sources(self) -> list[DraftSource]:
        """The `DraftSource`s among the `assistants`, without their PEFT wrappers."""
        return [inner for inner in map(unwrapped, self.assistants) if isinstance(inner, DraftSource)]

    @property
    def has_stock_assistant(self) -> bool:
        """Whether Transformers' assisted decoding runs: with a model, no `DraftSource`, and no policy or "plain"."""
        is_model = isinstance(self.assistant_model, Module) and not self.sources
        return is_model and (self.policy is None or self.is_plain)

    @property
    def asks_trees(self) -> bool:
        """Whether models of Transformers passed as assistants draft trees: with a policy, or in a list of assistants.

        A `CandidateGenerator` always drafts trees, since Transformers' own `generate` does not accept such an object.
        """
        asks = self.policy is not None or isinstance(self.assistant_model, list | tuple | CandidateGenerator)
        return asks and not self.is_plain

    def loaded(self, load: Callable[[Any], Any]) -> Self:
        """Return a copy in which every assistant is replaced by `load(assistant)`."""
        given = self.assistant_model
        if isinstance(given, list | tuple):
            return replace(self, assistant_model=[load(one) for one in given])
        return self if given is None else replace(self, assistant_model=load(given))

    @property
    def is_plain(self) -> bool:
        return isinstance(self.policy, str) and self.policy == PLAIN

    def or_else(self, other: "Keywords") -> Self:
        """Return a copy in which `other` supplies the value of each keyword that is `None` here."""
        said = {field.name: getattr(self, field.name) for field in fields(Keywords)}
        return replace(self, **{name: getattr(other, name) for name, value in said.items() if value is None})


_are_suspended: ContextVar[bool] = ContextVar("resps_defaults_are_suspended", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults(Keywords):
    """The keywords of `attach`: defaults for `generate` calls without them, such as the calls of TRL's trainers."""

    eval_mode: bool = False  # run every call in evaluation mode, even while the model trains

    @staticmethod
    @contextmanager
    def suspended() -> Iterator[None]:
        """Ignore all models' defaults inside the `with` block, in this thread."""
        token = _are_suspended.set(True)
        try:
            yield
        finally:
            _are_suspended.reset(token)

    @staticmethod
    def are_suspended() -> bool:
        """Whether defaults are ignored in this thread now."""
        return _are_suspended.get()
