"""What an attached model keeps from call to call: defaults, what policies learned, named heads, compiled code."""

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Self

from torch.nn import Module
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..drafting.engine import DraftEngines
from ..heads import DraftHead
from ..policies.auto import PolicyCache
from ..policies.base import Policy
from ..verifying.slots import SlotEngine


AUTO: Literal["auto"] = "auto"  # as `policy` our default one, which learns while it decodes
PLAIN: Literal["plain"] = "plain"  # stock decoding, whatever `attach` was given
# True compiles at the first step, "auto" when eager steps have taken as long as compiling will
CompileChoice = bool | Literal["auto"]


def is_name(value: Any) -> bool:
    """Whether a keyword of `generate` is a folder or a Hub id, and no word such as "auto"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO, PLAIN)


@dataclass(frozen=True, slots=True)
class Keywords:
    """The keywords of `generate` that speculation adds, and its assistant; `None` where nothing is said.

    Attributes:
        assistant_model: a draft head, its folder or Hub id, or an assistant of Transformers' own.
        policy: a policy, its folder or Hub id, "auto" or "plain".
        lockstep: whether the rows of a batch advance together.
        compile: whether the target's steps run compiled.
    """

    assistant_model: Any = None
    policy: Any = None
    lockstep: bool | None = None
    compile: CompileChoice | None = None

    @property
    def head(self) -> DraftHead | None:
        """The loaded head, also from inside a PEFT wrapper; `None` for a name and for any other assistant."""
        inner = unwrapped(self.assistant_model)
        return inner if isinstance(inner, DraftHead) else None

    @property
    def has_stock_assistant(self) -> bool:
        """Whether the call drafts in Transformers' own way."""
        return self.assistant_model is not None and not is_name(self.assistant_model) and self.head is None

    @property
    def is_plain(self) -> bool:
        """Whether stock decoding is asked for by name."""
        return isinstance(self.policy, str) and self.policy == PLAIN

    def or_else(self, other: "Keywords") -> Self:
        """These keywords, each replaced by the other's where it says nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(Keywords)}
        return replace(self, **{name: getattr(other, name) for name, value in said.items() if value is None})

    def check(self) -> None:
        """Refuse keywords of the wrong kind, before any work.

        Raises:
            ValueError: names the keyword and what it takes.
        """
        if isinstance(self.assistant_model, type):
            raise ValueError(
                f"`assistant_model` must be a folder, a Hub id, or a loaded model or head, got "
                f"{self.assistant_model!r}. Pass `DraftHead.from_pretrained(...)`."
            )
        if not isinstance(self.lockstep, bool | None):
            raise ValueError(f"`lockstep` must be True, False or None, got {self.lockstep!r}.")
        if self.compile is not None and not isinstance(self.compile, bool) and self.compile != AUTO:
            raise ValueError(f"`compile` must be True, False, 'auto' or None, got {self.compile!r}.")
        if self.is_plain and self.assistant_model is not None and not self.has_stock_assistant:
            raise ValueError("`policy='plain'` decodes without a draft head. Leave out one of the two.")
        self._check_policy()

    def _check_policy(self) -> None:
        policy = self.policy
        if policy is None or isinstance(policy, Policy) or (isinstance(policy, str) and policy in (AUTO, PLAIN)):
            return
        takes = (
            "`policy` must be 'auto', 'plain', a folder, a Hub id (`owner/name`) or an object of a subclass of "
            f"`Policy`, got {policy!r}."
        )
        if not is_name(policy):
            raise ValueError(
                f"{takes} Subclass `transformers_resps.Policy`, write `choose`, and pass an object, not the class."
            )
        if "/" not in os.fspath(policy) and not Path(policy).is_dir():  # such as a mistyped "auto"
            raise ValueError(f"{takes} Check the word, or the path.")


_are_suspended: ContextVar[bool] = ContextVar("resps_defaults_are_suspended", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults(Keywords):
    """What `attach` was given: keywords for every call that leaves them out, such as those of TRL's trainers.

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

    def in_force(self) -> "SpeculationDefaults":
        """These defaults, or empty ones while they are suspended."""
        return SpeculationDefaults() if _are_suspended.get() else self

    def fill(self, call: Keywords) -> Keywords:
        """The keywords of a call, filled up from these; a call with an assistant of Transformers' own takes none."""
        if call.has_stock_assistant:
            return call
        filled = call.or_else(self)
        speculates = filled.assistant_model is not None or filled.policy is not None
        return filled if speculates else replace(filled, lockstep=call.lockstep, compile=call.compile)


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
        has_verified_trees: whether it was seen to verify a draft tree, or is of an architecture that does.
    """

    def __init__(self, defaults: SpeculationDefaults | None = None) -> None:
        self.defaults = defaults or SpeculationDefaults()
        self.policy_cache = PolicyCache()
        self.named_heads = NamedHeads()
        self.evaluation_mode = EvaluationMode()
        self.slot_engine = SlotEngine()
        self.draft_engines = DraftEngines()
        self.has_verified_trees = False

    def __reduce__(self) -> tuple[type["SpeculationState"], tuple[SpeculationDefaults]]:
        return SpeculationState, (self.defaults,)
