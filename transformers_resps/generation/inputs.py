"""What Transformers has prepared of a call when decoding begins.

Whether the rows of a batch advance in lockstep.

A batch may be ragged only if nothing in the call can notice: plain decoding shows every processor and criterion all
rows at once, at the same length. What is not known to treat each row separately requires lockstep.

How the target verifies the trees of a call: over a cache that grows, or over slots, compiled or not.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..compat import CACHE_KEYWORD
from ..decoding.processors import is_stateless
from ..decoding.text import Text
from ..verifying.attention import longrope_boundary
from ..verifying.forward import TargetForward, are_outputs, is_compiled
from ..verifying.hybrids import is_recurrent
from ..verifying.slots import SlotEngine
from ..verifying.verifier import SlotVerifier, TreeVerifier, Verifier
from .request import AUTO, CompileChoice, compile_obstacle


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """The inputs of one call of `generate`, as stock `generate` hands them to the method that decodes.

    Attributes:
        input_ids: `[b, s]` the prompts.
        logits_processor: as merged by Transformers.
        stopping_criteria: likewise.
        config: the `GenerationConfig` of the call.
        streamer: the caller's, or `None`.
        model_kwargs: cache, mask and positions; whatever else the target's forward takes.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: Any
    streamer: Any
    model_kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        return self.model_kwargs[CACHE_KEYWORD]

    @property
    def max_length(self) -> int:
        """Positions a text may reach: a fraction is rounded up, and no limit is `sys.maxsize`."""
        most: float = self.config.max_length
        return math.ceil(most) if most < sys.maxsize else sys.maxsize

    @property
    def is_cache_given(self) -> bool:
        """Whether the cache is the caller's, who may reuse it."""
        return bool(getattr(self.cache, "_is_user_defined", False))

    @property
    def keeps_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def keeps_logits(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_logits)

    def text(self, input_ids: Tensor) -> Text:
        """The text that begins with `input_ids` `[b, s]`, all rows of the call or one."""
        return Text(
            input_ids,
            self.logits_processor,
            self.stopping_criteria,
            do_sample=self.config.do_sample,
            pad_token=self.config._pad_token_tensor,
            streamer=self.streamer,
            keep_scores=self.keeps_scores,
            keep_logits=self.keeps_logits,
            keep_padding=self.is_cache_given,
        )


_CRITERIA_BY_ROW = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})


def lockstep_reason(
    target: PreTrainedModel,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    asked: dict[str, bool],
) -> str | None:
    """Say what in a call requires lockstep; `None` when nothing does.

    Args:
        target: the model.
        logits_processor: of the call.
        stopping_criteria: of the call.
        asked: name -> whether the caller asks for it; each is an output of all rows at once.
    """
    for processor in logits_processor:
        if not is_stateless(processor):
            return f"the logits processor {type(processor).__name__}, which may look at all rows at once"
    for criterion in stopping_criteria:
        if not _is_by_row(criterion):
            return f"the stopping criterion {type(criterion).__name__}, which may look at all rows at once"
    kinds = {type(criterion).__name__ for criterion in stopping_criteria}
    if "EosTokenCriteria" not in kinds and kinds != {"MaxLengthCriteria"}:
        return "stopping criteria without an end token, after which finished rows go on"
    for name, is_asked in asked.items():
        if is_asked:
            return f"{name}, for all rows at once"
    if longrope_boundary(target.config) is not None:
        return "a target of rope_type 'longrope', whose frequencies depend on the longest row"
    return None


def is_lockstep(lockstep: bool | None, do_sample: bool, reason: str | None) -> bool:
    """Decide whether the rows of a call advance in lockstep.

    Args:
        lockstep: what the caller asks for; with `None`, a greedy batch is ragged and a sampled one in lockstep, since
            plain sampling draws the random numbers of all rows at once.
        do_sample: whether tokens are drawn.
        reason: why they must, if they must.

    Raises:
        ValueError: the caller asks for a ragged batch where lockstep is required.
    """
    if lockstep is False and reason is not None:
        raise ValueError(f"`lockstep=False` does not work with {reason}. Leave out `lockstep`, or what requires it.")
    return reason is not None or (do_sample if lockstep is None else lockstep)


def _is_by_row(criterion: object) -> bool:
    kind = type(criterion)
    return kind.__name__ in _CRITERIA_BY_ROW and kind.__module__.startswith("transformers.generation.")


@contextmanager
def tree_verifier(
    target: PreTrainedModel,
    engine: SlotEngine,
    layers: list[int] | None,
    choice: CompileChoice | None,
    inputs: GenerateInputs,
) -> Iterator[Verifier]:
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
        engine.borrow(target) if compiles else nullcontext() as lent,
        SlotVerifier(forward, lent, *given, options=options) as verifier,
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
