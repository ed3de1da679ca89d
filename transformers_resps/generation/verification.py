"""How the target verifies the trees of a call: over a cache that grows, or over slots, compiled or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from ..target.forward import TargetForward, are_outputs, is_compiled
from ..target.known_mixers import is_recurrent
from ..target.slot_engine import SlotEngine
from ..target.slot_verifier import SlotTreeVerifier
from ..target.tree_verifier import TreeVerifier
from .compiling import AUTO, CompileChoice, compile_obstacle
from .generate_inputs import GenerateInputs


@contextmanager
def tree_verifier(
    target: PreTrainedModel,
    engine: SlotEngine,
    layers: list[int] | None,
    choice: CompileChoice | None,
    inputs: GenerateInputs,
) -> Iterator[TreeVerifier]:
    """The verifier of one call, open.

    Args:
        target: the model.
        engine: the model's own.
        layers: the head's feature layers; `None` without a head.
        choice: the call's `compile`; `None` leaves it to its config.
        inputs: of the call.

    Raises:
        ValueError: a recurrent target was compiled, or has to decode over a static cache.
    """
    is_static = inputs.config.cache_implementation == "static" or is_compiled(target)
    if is_static and is_recurrent(target):
        raise ValueError(
            f"{type(target).__name__} has recurrent layers and cannot verify trees over a static cache or compiled. "
            "Leave out `cache_implementation`, and use the model as it was before it was compiled."
        )
    forward = TargetForward(target, layers, inputs.cache)
    given = inputs.model_kwargs["position_ids"], inputs.model_kwargs["attention_mask"]
    choice = _configured(target, inputs.config) if choice is None else choice
    compiles = choice is True or (choice == AUTO and engine.pays)
    obstacle = compile_obstacle(target, forward.layers) if compiles else None
    if obstacle is not None and choice is True:
        engine.warn(obstacle)
    compiles = compiles and obstacle is None and not is_compiled(target)
    if not compiles and not (is_static and are_outputs(target, forward.layers)):
        with TreeVerifier(forward, *given) as verifier:
            yield verifier
        return
    options = _options(inputs.config.compile_config)
    with (
        (engine if compiles else SlotEngine(compiles=False)).borrow(target) as lent,
        SlotTreeVerifier(forward, lent, forward.layers, *given, options=options) as verifier,
    ):
        yield verifier


def _configured(target: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether plain `generate` would compile, or is told how to."""
    if config.disable_compile:
        return False
    is_static = config.cache_implementation == "static" and target.device.type == "cuda"
    return config.compile_config is not None or is_static


def _options(config: CompileConfig | None) -> dict[str, Any] | None:
    """What the caller says of how to compile; `None` leaves it to us."""
    return None if config is None or config == CompileConfig() else config.to_dict()
