"""The keywords of speculation, in a call of `generate`, in a generation config, and as defaults of `attach`."""

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


AUTO: Literal["auto"] = "auto"  # as `policy` our default one, which learns while it decodes
PLAIN: Literal["plain"] = "plain"  # stock decoding, whatever `attach` was given
MTP: Literal["mtp"] = "mtp"  # as `assistant_model` the layers that came with the target
USE_MTP = "use_mtp"  # Transformers' keyword for them: with a policy they draft trees
# The keywords that a `generation_config` may hold, as JSON of these types.
CONFIG_KEYWORDS: dict[str, type] = {"policy": str, "lockstep": bool, "invariant": bool}
# True compiles at the first step, "auto" in another process on a CPU
CompileChoice = bool | Literal["auto"]


def is_name(value: Any) -> bool:
    """Whether a keyword of `generate` is a folder or a Hub id, and no word such as "auto"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO, PLAIN)


@dataclass(frozen=True, slots=True)
class Keywords:
    """The keywords of `generate` that speculation adds, and its assistant; `None` where nothing is said.

    Attributes:
        assistant_model: a source, its folder or Hub id, an assistant of Transformers' own, or several sources.
        policy: a policy, its folder or Hub id, "auto" or "plain".
        lockstep: whether the rows of a batch advance together.
        compile: whether the target's steps run compiled.
        invariant: whether the text is to be the same in any dtype, whatever drafts.
    """

    assistant_model: Any = None
    policy: Any = None
    lockstep: bool | None = None
    compile: CompileChoice | None = None
    invariant: bool | None = None

    @staticmethod
    def saved_in(config: GenerationConfig | None) -> "Keywords":
        """Read the keywords of a `generation_config.json`; Transformers itself refuses an `assistant_model` there."""
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
        """The assistants as a list, empty for none."""
        given = self.assistant_model
        return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]

    @property
    def sources(self) -> list[DraftSource]:
        """The sources among the assistants, also from inside PEFT wrappers."""
        return [inner for inner in map(unwrapped, self.assistants) if isinstance(inner, DraftSource)]

    @property
    def has_stock_assistant(self) -> bool:
        """Whether the call drafts in Transformers' own way: with a policy, a small model drafts trees."""
        is_model = isinstance(self.assistant_model, Module) and not self.sources
        return is_model and (self.policy is None or self.is_plain)

    @property
    def asks_trees(self) -> bool:
        """Whether models of Transformers draft trees, too: with a policy, or beside others. Candidate generators
        always do, since stock takes none.
        """
        asks = self.policy is not None or isinstance(self.assistant_model, list | tuple | CandidateGenerator)
        return asks and not self.is_plain

    def loaded(self, load: Callable[[Any], Any]) -> Self:
        """The same with every assistant as `load` returns it."""
        given = self.assistant_model
        if isinstance(given, list | tuple):
            return replace(self, assistant_model=[load(one) for one in given])
        return self if given is None else replace(self, assistant_model=load(given))

    @property
    def is_plain(self) -> bool:
        """Whether stock decoding is asked for by name."""
        return isinstance(self.policy, str) and self.policy == PLAIN

    def or_else(self, other: "Keywords") -> Self:
        """These keywords, each replaced by the other's where it says nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(Keywords)}
        return replace(self, **{name: getattr(other, name) for name, value in said.items() if value is None})


_are_suspended: ContextVar[bool] = ContextVar("resps_defaults_are_suspended", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults(Keywords):
    """The keywords of `attach`, for every call that leaves them out, such as those of TRL's trainers.

    Attributes:
        eval_mode: every call runs in evaluation mode, also while the model trains.
    """

    eval_mode: bool = False

    @staticmethod
    @contextmanager
    def suspended() -> Iterator[None]:
        """Ignore all models' defaults inside the `with` block, in this thread: calls without keywords are plain."""
        token = _are_suspended.set(True)
        try:
            yield
        finally:
            _are_suspended.reset(token)

    @staticmethod
    def are_suspended() -> bool:
        """Whether they are ignored in this thread now."""
        return _are_suspended.get()
