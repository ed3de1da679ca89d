"""What one call of `generate` asks for, read and checked before any work."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel

from ..compat import unwrapped
from ..head import BoundHead, DraftHead, pair_identity
from ..policy import FixedPolicy, Policy
from .call_checks import check_settings
from .compiling import CompileChoice, check_compile
from .model_checks import check_draws, check_model
from .named import AUTO, PLAIN, check_policy_name, is_name


class Asked(NamedTuple):
    """The keywords of a call, as it gives them or as `attach` was told; `None` where neither says anything.

    Attributes:
        assistant_model: a draft head, its name, or an assistant of Transformers' own.
        policy: a policy or its name.
        lockstep: whether the rows of a batch advance together.
        compile: whether the target's steps run compiled.
    """

    assistant_model: Any = None
    policy: Any = None
    lockstep: Any = None
    compile: Any = None


@dataclass(frozen=True, slots=True)
class Request:
    """What one call of `generate` asked for; it cannot travel through Transformers' own preparation.

    Attributes:
        bound: the head that drafts; `None` to draft by lookup alone.
        policy: decides.
        lockstep: whether the rows of a batch advance together; `None` when the caller leaves it to us.
        compile: whether the target's steps run compiled; `None` likewise.
    """

    bound: BoundHead | None
    policy: Policy
    lockstep: bool | None
    compile: CompileChoice | None = None


def draft_head(assistant_model: Any) -> DraftHead | None:
    """The head itself, also from inside a PEFT wrapper; `None` for any other assistant."""
    inner = unwrapped(assistant_model)
    return inner if isinstance(inner, DraftHead) else None


def is_stock_assistant(assistant_model: Any) -> bool:
    """Whether a call drafts in Transformers' own way: its assistant is neither a head nor the name of one."""
    return assistant_model is not None and not is_name(assistant_model) and draft_head(assistant_model) is None


def read_request(
    target: PreTrainedModel,
    asked: Asked,
    config: GenerationConfig | None,
    arguments: Mapping[str, Any],
    borrow: Callable[[str], Policy],
) -> Request | None:
    """Read what a call asks for and check it; `None` for a stock call.

    Args:
        target: the model.
        asked: of the call.
        config: the `generation_config` of the call.
        arguments: all its other keyword arguments.
        borrow: lends the policy that "auto", a folder or a Hub id stands for.

    Raises:
        ValueError: it asks for what a tree cannot do.
    """
    check_kinds(asked)
    assistant_model, policy, lockstep, compile = asked
    head = draft_head(assistant_model)
    if head is None and policy is None:
        if lockstep is not None:
            raise ValueError(
                f"Got lockstep={lockstep!r} without a draft head or a policy, but only draft trees make a batch "
                "ragged. Leave out `lockstep`."
            )
        if compile:
            raise ValueError(
                f"Got compile={compile!r} without a draft head or a policy, but only our own steps are compiled. Pass "
                "`policy='auto'`, or `policy=FixedPolicy(TreeShape.plain())` for compiled plain decoding."
            )
        return None
    if head is None and assistant_model is not None:
        raise ValueError(
            f"Got policy={policy!r} with assistant_model={type(assistant_model).__name__}, but a policy shapes the "
            "trees of a draft head. Pass `assistant_model=DraftHead.from_pretrained(...)`, or leave out `policy`."
        )
    check_model(target)
    check_settings(target, config, arguments)
    bound = None if head is None else BoundHead(head, target)
    if head is not None:
        check_draws(head)
    policy = _resolve_policy(policy, head, borrow)
    if policy.has_identity:
        policy.check_identity(**pair_identity(target, head))
    return Request(bound, policy, lockstep, compile)


def is_plain(assistant_model: Any, policy: Any) -> bool:
    """Whether a call asks for stock decoding by name.

    Raises:
        ValueError: and for a draft head as well.
    """
    if not (isinstance(policy, str) and policy == PLAIN):
        return False
    if assistant_model is not None and not is_stock_assistant(assistant_model):
        raise ValueError("`policy='plain'` decodes without a draft head. Leave out one of the two.")
    return True


def check_kinds(asked: Asked) -> None:
    """Refuse keywords of the wrong kind.

    Raises:
        ValueError: names the keyword and what it takes.
    """
    assistant_model, policy, lockstep, compile = asked
    if isinstance(assistant_model, type):
        raise ValueError(
            f"`assistant_model` must be a folder, a Hub id, or a loaded model or head, got {assistant_model!r}. Pass "
            "`DraftHead.from_pretrained(...)`."
        )
    if not isinstance(lockstep, bool | None):
        raise ValueError(f"`lockstep` must be True, False or None, got {lockstep!r}.")
    check_compile(compile)
    if is_name(policy):
        check_policy_name(policy)
    elif not (policy is None or (isinstance(policy, str) and policy == AUTO) or isinstance(policy, Policy)):
        raise ValueError(
            f"`policy` must be 'auto', 'plain', a folder, a Hub id or an object of a subclass of `Policy`, got "
            f"{policy!r}. Subclass `transformers_resps.Policy`, write `choose`, and pass an object, not the class."
        )


def _resolve_policy(policy: Any, head: DraftHead | None, borrow: Callable[[str], Policy]) -> Policy:
    if policy is None and head is not None:
        return FixedPolicy(head.default_shape)
    if isinstance(policy, str) and policy == AUTO:
        return borrow(AUTO)
    if is_name(policy):
        policy = borrow(os.fspath(policy))
    if head is None and policy.needs_head:
        raise ValueError(
            f"policy={policy!r} shapes the trees of a draft head, and the call has none. Pass "
            "`assistant_model=DraftHead.from_pretrained(...)`, or `policy='auto'` to draft by lookup alone."
        )
    resolved: Policy = policy
    return resolved
