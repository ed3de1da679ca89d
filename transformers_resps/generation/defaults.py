"""What `attach` was given: head, policy and rows for every call of `generate` that names none.

For callers that pass no keyword through, such as the trainers of TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..policy import Policy
from .evaluation_mode import EvaluationMode
from .request import draft_head


_ATTRIBUTE = "_resps_defaults"
_are_set_aside: ContextVar[bool] = ContextVar("resps_defaults_are_set_aside", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """Keywords of `generate` that hold where a call leaves them out.

    Attributes:
        assistant_model: the draft head; `None` for none.
        policy: shapes the trees; `None` leaves it to the call.
        lockstep: whether the rows of a batch advance together; `None` leaves it to the call.
        eval_mode: every call runs in evaluation mode, also while the model trains.
        mode: of the model's layers, for `eval_mode`.
    """

    assistant_model: Any = None
    policy: Policy | str | None = None
    lockstep: bool | None = None
    eval_mode: bool = False
    mode: EvaluationMode = field(default_factory=EvaluationMode, compare=False, repr=False)

    def keep(self, target: Any) -> None:
        """Hold for `target` from now on, instead of earlier ones."""
        target.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, target: Any) -> "SpeculationDefaults":
        """Those of a model; empty ones where `attach` was given nothing, and while they are set aside."""
        kept: SpeculationDefaults | None = None if _are_set_aside.get() else target.__dict__.get(_ATTRIBUTE)
        return cls() if kept is None else kept

    @staticmethod
    def forget(target: Any) -> None:
        target.__dict__.pop(_ATTRIBUTE, None)

    @staticmethod
    @contextmanager
    def set_aside() -> Iterator[None]:
        """Inside, no model has any: a call that names nothing is plain. Other threads do not notice."""
        token = _are_set_aside.set(True)
        try:
            yield
        finally:
            _are_set_aside.reset(token)

    def fill(self, assistant_model: Any, policy: Any, lockstep: Any) -> tuple[Any, Any, Any]:
        """The three keywords of a call, each replaced by its default where it is `None`.

        A call with an assistant of Transformers' own takes none of them.
        """
        if assistant_model is not None and draft_head(assistant_model) is None:
            return assistant_model, policy, lockstep
        assistant_model = self.assistant_model if assistant_model is None else assistant_model
        policy = self.policy if policy is None else policy
        if lockstep is None and not (assistant_model is None and policy is None):
            lockstep = self.lockstep
        return assistant_model, policy, lockstep
