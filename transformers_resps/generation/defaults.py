"""What `attach` was given: keywords for every call of `generate` that leaves them out.

For callers that pass no keyword through, such as the trainers of TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..policy import Policy
from .compiling import CompileChoice
from .evaluation_mode import EvaluationMode
from .request import Asked, is_stock_assistant


_are_suspended: ContextVar[bool] = ContextVar("resps_defaults_are_suspended", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """Keywords of `generate` that hold where a call leaves them out.

    Attributes:
        assistant_model: the draft head; `None` for none.
        policy: shapes the trees; `None` leaves it to the call.
        lockstep: whether the rows of a batch advance together; `None` leaves it to the call.
        compile: whether the target's steps run compiled; likewise.
        eval_mode: every call runs in evaluation mode, also while the model trains.
        mode: of the model's layers, for `eval_mode`.
    """

    assistant_model: Any = None
    policy: Policy | str | None = None
    lockstep: bool | None = None
    compile: CompileChoice | None = None
    eval_mode: bool = False
    mode: EvaluationMode = field(default_factory=EvaluationMode, compare=False, repr=False)

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
        """Return these defaults, or empty ones while they are suspended."""
        return SpeculationDefaults() if _are_suspended.get() else self

    def fill(self, asked: Asked) -> Asked:
        """The keywords of a call, each replaced by its default where it is `None`.

        A call with an assistant of Transformers' own takes none of them.
        """
        if is_stock_assistant(asked.assistant_model):
            return asked
        filled = Asked(*(own if given is None else given for given, own in zip(asked, self._asked, strict=True)))
        speculates = filled.assistant_model is not None or filled.policy is not None
        return filled if speculates else filled._replace(lockstep=asked.lockstep, compile=asked.compile)

    @property
    def _asked(self) -> Asked:
        return Asked(self.assistant_model, self.policy, self.lockstep, self.compile)
