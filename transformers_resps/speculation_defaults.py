"""What `attach` was given: head, policy and rows for every call of `generate` that names none.

For callers that pass no keyword through, such as the trainers of TRL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .policy import Policy
from .request import PLAIN, draft_head


_ATTRIBUTE = "_resps_defaults"


@dataclass(frozen=True, slots=True)
class SpeculationDefaults:
    """Keywords of `generate` that hold where a call leaves them out.

    Attributes:
        assistant_model: the draft head; `None` for none.
        policy: shapes the trees; `None` leaves it to the call.
        lockstep: whether the rows of a batch advance together; `None` leaves it to the call.
        eval_mode: every call runs in evaluation mode, also while the model trains.
    """

    assistant_model: Any = None
    policy: Policy | str | None = None
    lockstep: bool | None = None
    eval_mode: bool = False

    def keep(self, target: Any) -> None:
        """Hold for `target` from now on, instead of earlier ones."""
        target.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, target: Any) -> "SpeculationDefaults":
        """Those of a model; empty ones where `attach` was given nothing."""
        kept: SpeculationDefaults = target.__dict__.get(_ATTRIBUTE) or cls()
        return kept

    @staticmethod
    def forget(target: Any) -> None:
        target.__dict__.pop(_ATTRIBUTE, None)

    @staticmethod
    @contextmanager
    def set_aside(target: Any) -> Iterator[None]:
        """Inside, `target` has none, so that a plain call is plain; afterwards those that it had."""
        kept = target.__dict__.pop(_ATTRIBUTE, None)
        try:
            yield
        finally:
            if kept is not None:
                target.__dict__[_ATTRIBUTE] = kept

    def fill(self, assistant_model: Any, policy: Any, lockstep: Any) -> tuple[Any, Any, Any]:
        """The three keywords of a call, each replaced by its default where it is `None`.

        A call with `policy="plain"` or with an assistant of Transformers' own takes none of them.

        Raises:
            ValueError: `policy="plain"` together with a draft head.
        """
        head = draft_head(assistant_model)
        if isinstance(policy, str) and policy == PLAIN:
            if head is not None:
                raise ValueError("`policy='plain'` decodes without a draft head. Leave out one of the two.")
            return assistant_model, None, lockstep
        if assistant_model is not None and head is None:
            return assistant_model, policy, lockstep
        assistant_model = self.assistant_model if head is None else assistant_model
        policy = self.policy if policy is None else policy
        if lockstep is None and not (assistant_model is None and policy is None):
            lockstep = self.lockstep
        return assistant_model, policy, lockstep


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Inside, no layer of `models` (some may be `None`) is in training mode; afterwards those that were are again."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
