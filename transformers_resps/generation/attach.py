"""`attach` puts a mixin in front of a model's class, in memory only; `detach` removes it."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..compat import unwrapped
from ..drafting import DraftSource
from ..policies.base import Policy
from ..policies.saving import AutoPolicy
from .checks import check_keywords
from .keywords import CompileChoice, SpeculationDefaults, is_name
from .mixin import ReSpSGenerationMixin
from .request import SpeculationState


Model = TypeVar("Model", bound=torch.nn.Module)


def attach(
    model: Model,
    *,
    assistant_model: DraftSource | PreTrainedModel | str | os.PathLike[str] | Sequence[Any] | None = None,
    policy: Policy | str | os.PathLike[str] | None = None,
    lockstep: bool | None = None,
    compile: CompileChoice | None = None,
    eval_mode: bool = False,
    invariant: bool | None = None,
) -> Model:
    """Let `model.generate` accept draft heads and policies; returns the same object, with the same weights.

    The keywords become defaults of later `generate` calls, for callers that cannot pass them, such as TRL's trainers.
    A second `attach` with keywords replaces all defaults. `generate(..., policy="plain")` ignores the defaults, and
    `detach` forgets them.

    Args:
        model: a decoder-only model of Transformers, an encoder-decoder without a head, or a PEFT model around either.
        assistant_model: a `DraftHead` of this model or another source, its folder or Hub id, or a list of them; with a
            policy also a small causal model.
        policy: a `Policy`, its folder or Hub id, or "auto", which needs no head.
        lockstep: as in `generate`; `False` lets sampled rows of a batch advance independently.
        compile: as in `generate`; `True` or "auto" lets the target's steps run compiled.
        eval_mode: run every call in evaluation mode, without dropout, even if the model is in training mode.
        invariant: as in `generate`; with `True` the text does not depend on the drafts, even in half precision.

    Raises a `ValueError` if the model cannot generate, or cannot use one of the defaults.
    """
    inner = unwrapped(model)
    defaults = SpeculationDefaults(assistant_model, policy, lockstep, compile, invariant, eval_mode)
    if not isinstance(eval_mode, bool):
        raise ValueError(f"`eval_mode` must be True or False, got {eval_mode!r}.")
    check_keywords(defaults, are_defaults=True)
    _check_generate(inner)
    if is_name(policy):
        defaults = replace(defaults, policy=AutoPolicy.from_pretrained(cast(str, policy)))
    state: SpeculationState = vars(inner).get("speculation_state") or SpeculationState()  # `attached` keeps it
    target: PreTrainedModel = inner
    load = functools.partial(state.assistants.load, target)
    defaults = defaults.loaded(functools.partial(load, as_source=False))
    if defaults.has_stock_assistant:
        raise ValueError(
            "`attach` takes a `DraftHead` as `assistant_model`, or a model with a policy, got a "
            f"{type(assistant_model).__name__}. Pass a policy, too, or pass other assistants to `generate`."
        )
    for source in defaults.loaded(functools.partial(load, as_source=defaults.asks_trees)).sources:
        source.prepare(target)
    _add_mixin(inner)
    if defaults != SpeculationDefaults():
        state.defaults = defaults
        inner.speculation_state = state
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: restore the model's class, and drop its defaults and all that calls have learned or loaded."""
    inner = unwrapped(model)
    vars(inner).pop("speculation_state", None)
    _remove_mixin(inner)
    return model


@contextmanager
def attached(model: Model) -> Iterator[Model]:
    """Attach `model` inside the `with` block. Learned costs, loaded heads and compiled code are kept afterwards."""
    inner = unwrapped(model)
    was_attached = isinstance(inner, ReSpSGenerationMixin)
    attach(model)
    try:
        yield model
    finally:
        if not was_attached:
            _remove_mixin(inner)


@contextmanager
def detached(model: Model) -> Iterator[Model]:
    """Detach `model` inside the `with` block, then attach it again with its defaults and all that it has learned."""
    inner = unwrapped(model)
    if not isinstance(inner, ReSpSGenerationMixin):
        yield model
        return
    state = vars(inner).pop("speculation_state", None)
    _remove_mixin(inner)
    try:
        yield model
    finally:
        _add_mixin(inner)
        if state is not None:
            inner.speculation_state = state


def _check_generate(model: Any) -> None:
    """Raise if the model has no `generate`, or if adding the mixin to its class would not change `model.generate`."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"Got a {type(model).__name__} of `torch.compile`, whose `generate` runs the model inside it as it is. "
            "Call `attach` on the model first, and pass `compile=True` to it or to `generate` for compiled steps."
        )
    if not isinstance(model, GenerationMixin):
        raise ValueError(
            f"Got a {type(model).__name__}, but only models with `generate` can be attached. Load it with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )
    if "generate" in vars(model) and not isinstance(model, ReSpSGenerationMixin):
        raise ValueError(
            f"This {type(model).__name__} object has a `generate` of its own that hides its class's, as loading a "
            "`custom_generate` folder with `trust_remote_code=True` gives it. Call `del model.generate` before "
            "`attach`, if the class's decoding is what you want."
        )


def _add_mixin(model: Any) -> None:
    if not isinstance(model, ReSpSGenerationMixin):
        base: Any = type(model)
        model.__class__ = _attached_class(base)


def _remove_mixin(model: Any) -> None:
    """Restore the class that the model had before `attach`; do nothing if `attach` did not change its class."""
    if vars(type(model)).get("__reduce_ex__") is _reduce:
        model.__class__ = type(model).__mro__[2]


@functools.cache
def _attached_class(base: type) -> type:
    """Make a subclass of the mixin and `base`, with the name and module of `base`, which `save_pretrained` stores."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ReSpSGenerationMixin, base), names | {"__reduce_ex__": _reduce})


def _reduce(model: Any, protocol: Any) -> Any:
    """Pickle and copy a model by its original class, since the class made by `_attached_class` is in no module."""
    reduced: Any = super(ReSpSGenerationMixin, model).__reduce_ex__(protocol)
    function, arguments, *state = reduced
    if arguments and arguments[0] is type(model):
        return (_new_attached, (type(model).__mro__[2], *arguments[1:]), *state)
    return (function, arguments, *state)


def _new_attached(base: type, *arguments: Any) -> Any:
    cls = _attached_class(base)
    return cls.__new__(cls, *arguments)
