"""Whether a call's steps run compiled: what a caller may ask for, and what stands against it.

Heads and policies that a call names by a folder or a Hub id, each loaded once for a target.

What one call of `generate` asks for, read and checked before any work.

Evaluation mode for the time of a call, for models that train.

What `attach` was given: keywords for every call of `generate` that leaves them out.

For callers that pass no keyword through, such as the trainers of TRL.
"""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from ..compat import unwrapped
from ..heads import BoundHead, DraftHead, pair_identity
from ..policies import FixedPolicy, Policy
from ..verifying.forward import are_outputs
from ..verifying.hybrids import is_recurrent
from .checks import check_draws, check_model, check_settings


AUTO: Literal["auto"] = "auto"
# True compiles at the first step, "auto" when eager steps have taken as long as compiling will
CompileChoice = bool | Literal["auto"]


def check_compile(value: Any) -> None:
    """Refuse other values of `compile`.

    Raises:
        ValueError: says which there are.
    """
    if value is not None and not isinstance(value, bool) and value != AUTO:
        raise ValueError(f"`compile` must be True, False, 'auto' or None, got {value!r}.")


def compile_obstacle(target: PreTrainedModel, layers: list[int]) -> str | None:
    """Say why the target's forward cannot be compiled with its weights inside; `None` if it can.

    Args:
        target: the model.
        layers: the head's feature layers.
    """
    devices = {parameter.device for parameter in target.parameters()}
    if target.training:
        return "the model is in training mode"
    if is_recurrent(target):
        return "the model has recurrent layers, which read a tree path by path"
    if not are_outputs(target, layers):
        return "the head reads the last layer's output, which a compiled forward gives only after the final norm"
    if any(_is_active_adapter(module) for module in target.modules()):
        return "an adapter is active; merge it first"
    if len(devices) != 1 or devices.pop().type not in ("cpu", "cuda"):
        return "the model is not on one CPU or CUDA device"
    if any(type(parameter) is not nn.Parameter for parameter in target.parameters()):
        return "its weights are quantized or sharded"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    return None


def _is_active_adapter(module: Any) -> bool:
    """Whether it is a layer of PEFT that adds to the layer inside it."""
    is_tuner = any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)
    return is_tuner and not (module.merged or module.disable_adapters)


AUTO_named = "auto"  # our default policy, which learns while it decodes
PLAIN = "plain"  # stock decoding, whatever `attach` was given
_KINDS = {"policy": str, "lockstep": bool}  # what a `generation_config.json` may hold


class NamedHeads:
    """The heads of one target that calls named, kept as long as the target lives.

    An attached model owns one as `named_heads`.
    """

    def __init__(self) -> None:
        self._heads: dict[Hashable, DraftHead] = {}

    def load(self, name: str | os.PathLike[str], target: PreTrainedModel) -> DraftHead:
        """The head of a folder or a Hub id, on the target's device and in its dtype.

        Raises:
            ValueError, OSError: as `DraftHead.from_pretrained`.
        """
        key = os.fspath(name), target.device, target.dtype
        if key not in self._heads:
            self._heads[key] = DraftHead.from_pretrained(name, target=target)
        return self._heads[key]

    def __reduce__(self) -> tuple[type["NamedHeads"], tuple[()]]:
        """A copied or pickled target loads them anew."""
        return NamedHeads, ()


def is_name(value: Any) -> bool:
    """Whether a keyword of `generate` is a folder or a Hub id, and no word of ours such as "auto"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO_named, PLAIN)


def check_policy_name(name: str | os.PathLike[str]) -> None:
    """Refuse a word that is neither a folder nor `owner/name`, such as a mistyped "auto", without asking the Hub.

    Raises:
        ValueError: says what `policy` takes.
    """
    if "/" not in os.fspath(name) and not Path(name).is_dir():
        raise ValueError(
            f"`policy` must be 'auto', 'plain', a folder, a Hub id (`owner/name`) or an object of a subclass of "
            f"`Policy`, got {name!r}. Check the word, or the path."
        )


def configured(policy: Any, lockstep: Any, *configs: GenerationConfig | None) -> tuple[Any, Any]:
    """A call's `policy` and `lockstep`, each as a `generation_config` says where it is `None`.

    Transformers itself refuses an `assistant_model` there.

    Args:
        policy: of the call.
        lockstep: of the call.
        configs: the call's, then the model's; the first that says something holds.

    Raises:
        ValueError: a config holds what its JSON file could not.
    """
    for config in configs:
        if isinstance(policy, str) and policy == PLAIN:  # whatever the next config says
            break
        policy = _said(config, "policy") if policy is None else policy
        lockstep = _said(config, "lockstep") if lockstep is None else lockstep
    return policy, lockstep


def _said(config: GenerationConfig | None, name: str) -> Any:
    value, kind = getattr(config, name, None), _KINDS[name]
    if not isinstance(value, kind | None):
        raise ValueError(
            f"`generation_config.{name}` is saved as JSON, so it must be a {kind.__name__}, got a "
            f"{type(value).__name__}. Pass the object to `generate` or `attach` instead."
        )
    return value


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

    def __reduce__(self) -> tuple[type["EvaluationMode"], tuple[()]]:
        """A copied or pickled model has no calls yet."""
        return EvaluationMode, ()


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
