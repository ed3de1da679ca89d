"""`attach` and `detach`: give a model object a class in which `generate` knows draft heads, and take it back.

The class is a subclass of the model's own, made in memory: same name, same module, same weights.
"""

import functools
from typing import Any, TypeVar

import torch
from transformers import GenerationMixin

from .adapters import unwrapped
from .generation import ReSpSGenerationMixin
from .policy import KeptPolicies


Model = TypeVar("Model", bound=torch.nn.Module)


def attach(model: Model) -> Model:
    """Let `model.generate` take draft heads and policies. Same object, same weights.

    Args:
        model: any decoder-only model of Transformers, or a PEFT model around one.

    Raises:
        ValueError: the model cannot generate.
    """
    inner = unwrapped(model)
    if not isinstance(inner, GenerationMixin):
        raise ValueError(
            f"Got a {type(inner).__name__}, but only models with `generate` can be attached. Load it with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )
    if not isinstance(inner, ReSpSGenerationMixin):
        base: Any = type(inner)
        inner.__class__ = _attached_class(base)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the same object, of its own class again."""
    inner = unwrapped(model)
    if vars(type(inner)).get("__reduce_ex__") is _reduce:  # not somebody's own subclass of the mixin
        inner.__class__ = type(inner).__mro__[2]
        KeptPolicies.forget(inner)
    return model


@functools.cache
def _attached_class(base: type) -> type:
    """`base` with the mixin in front; name and module stay, so that saving and output capturing see no difference."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ReSpSGenerationMixin, base), names | {"__reduce_ex__": _reduce})


def _reduce(model: Any, protocol: Any) -> Any:
    """Pickle and copy by the model's own class: the subclass exists in memory only."""
    reduced: Any = super(ReSpSGenerationMixin, model).__reduce_ex__(protocol)
    function, arguments, *state = reduced
    if arguments and arguments[0] is type(model):
        return (_new_attached, (type(model).__mro__[2], *arguments[1:]), *state)
    return (function, arguments, *state)


def _new_attached(base: type, *arguments: Any) -> Any:
    cls = _attached_class(base)
    return cls.__new__(cls, *arguments)
