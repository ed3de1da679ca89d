"""Whether a call's steps run compiled: what a caller may ask for, and what stands against it."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..target.forward import are_outputs
from ..target.known_mixers import is_recurrent


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
