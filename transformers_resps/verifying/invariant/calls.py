"""Refuse calls that the exact mode (`invariant=True`) does not support, and make the verifiers of other calls.

A caller's processor, criterion or layer that reads the clock or other rows is not detected (docs/same-text.md).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import (
    Cache,
    MaxTimeCriteria,
    PreTrainedModel,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from ...compilation.few_bits import has_few_bits, unread_weights
from ...compilation.native import keeps_rows_apart
from ..cache import cached_length, given_cache
from ..forward import TargetForward, is_compiled
from ..hybrids import is_recurrent
from ..masks import longrope_boundary
from ..prepacking import is_prepacked
from ..rows import RowEnds
from ..slots.buffers import SlotBuffers, parts_of
from ..slots.engine import SlotEngine
from ..slots.texts import SlotTexts, windowed
from ..slots.verifier import SlotVerifier
from ..unknown_targets import check_same_bits
from ..verifier import VerifyingMode
from .attention import INVARIANT, LENT
from .experts import has_invariant_experts
from .row_classes import RowClasses, RowNeeds, kernel_settings, possible_needs
from .verifier import ExactSteps, InvariantSteps, ModelCode, TextReader, doubled


logger = logging.getLogger(f"transformers.{__name__}")

Obstacle = tuple[str, str]  # the part of the call that is refused, and what to do instead

_OTHER_MODEL = "Use a decoder of text with attention layers alone"
TRIED_DEVICES = ("cpu",)  # devices on which the mode has run; tests/lossless/test_gpu.py is for GPUs
_POSITION_BIASES = ("relative_position_bias", "relative_attention_bias")  # submodules of attention layers


def _of_model(model: PreTrainedModel) -> Iterator[Obstacle]:
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if model.config.is_encoder_decoder:
        yield f"{name}, an encoder-decoder", _OTHER_MODEL
    if is_recurrent(model):
        yield (
            f"{name}, whose recurrent layers read prompts by chunks and steps one by one, which rounds otherwise",
            _OTHER_MODEL,
        )
    if config is not model.config:
        yield f"{name}, whose prompts stock `generate` reads, with images or sounds or without", _OTHER_MODEL
    if longrope_boundary(config) is not None:
        yield f"{name} of rope_type 'longrope', whose frequencies depend on the longest row", _OTHER_MODEL
    attention = config._attn_implementation
    if attention not in LENT and (attention != "eager" or model._supports_sdpa):
        yield f"attn_implementation={attention!r}", "Call `model.set_attn_implementation('sdpa')` first"
    if not model._can_set_attn_implementation():
        yield f"{name}, whose attention does not ask Transformers' `AttentionInterface`", _OTHER_MODEL
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"{name}, which caps the scores of its attention (`attn_logit_softcapping`)", _OTHER_MODEL


def _of_weights(model: PreTrainedModel, compile: bool | str | None) -> Iterator[Obstacle]:
    if not has_invariant_experts(model):
        name = type(model).__name__
        yield f"the experts of {name}, which do not ask Transformers' `ExpertsInterface`", "Use a model without"
    weights = list(model.parameters())
    odd = sorted({weight.device.type for weight in weights}.difference(TRIED_DEVICES))
    if odd:
        yield f"weights on {odd}, where the mode has never run", "Decode on a CPU"
    if model.dtype is torch.float64 and model.device.type != "cpu":
        yield "float64 on a GPU, where PyTorch has no attention for it", "Use float32"
    is_odd = getattr(model, "hf_quantizer", None) is not None or any(type(one) is not nn.Parameter for one in weights)
    is_read = not unread_weights(model) and has_few_bits(model)
    if is_odd and not (is_read and compile is True):
        yield "quantized or sharded weights", "Pass `compile=True`" if is_read else "Load the model without"


def _of_layers(model: PreTrainedModel) -> Iterator[Obstacle]:
    for module in model.modules():
        kind = type(module).__name__
        if is_compiled(module):
            yield (
                f"the {kind} that you compiled, which may round otherwise for another number of tokens",
                "Use the model as it was, and pass `compile=True`",
            )
        if any(name in module._modules for name in _POSITION_BIASES):
            yield f"the position biases of {kind}", _OTHER_MODEL


def _of_call(
    setting: Callable[[str], Any], arguments: Mapping[str, Any], media: Sequence[str], compile: bool | str | None
) -> Iterator[Obstacle]:
    if any(map(torch.is_autocast_enabled, TRIED_DEVICES)):
        yield "autocast", "Leave its block"
    if compile == "auto":
        yield "compile='auto', which goes by the clock", "Pass `compile=True`"
    if setting("compile_config") is not None:
        yield "a `compile_config`", "Pass `compile=True`"
    if setting("cache_implementation") == "static" or isinstance(given_cache(arguments), StaticCache):
        yield "a static cache", "Leave it out"
    if media:
        yield f"prompts of more than tokens, here {media}", "Pass `input_ids` alone"
    if setting("max_time") is not None or _holds(MaxTimeCriteria, arguments.get("stopping_criteria")):
        yield "`max_time`, which ends a text by the clock", "Set `max_new_tokens`"
    guided = setting("guidance_scale") not in (None, 1)
    if guided or _holds(UnbatchedClassifierFreeGuidanceLogitsProcessor, arguments.get("logits_processor")):
        yield "`guidance_scale`, which runs the model once more, in the normal mode", "Leave it out"


def _holds(kind: type, given: Iterable[Any] | None) -> bool:
    return any(isinstance(one, kind) for one in given or ())


@dataclass(frozen=True, slots=True)
class InvariantMode(VerifyingMode):
    """Makes verifiers with which a node's logits depend only on its own text, not on other tokens of the forward."""

    target_engine: SlotEngine  # the target's engine, even if another call uses it
    code: ModelCode  # checks of compiled code, shared by all calls of the model
    needs: RowNeeds
    compiles: bool = False  # whether steps run compiled
    attention: ClassVar[str] = INVARIANT
    keywords: ClassVar[Mapping[str, Any]] = {"invariant": True}
    is_stock: ClassVar[bool] = False

    def __str__(self) -> str:
        return "invariant slots"

    def compose(
        self, forward: TargetForward, rows: RowEnds, engine: SlotEngine | None, gives_back: bool
    ) -> SlotVerifier:
        if self.compiles and engine is None:
            raise ValueError(
                "Another call runs the compiled code of this model, and steps that are not compiled round otherwise. "
                "Call `generate` when it has ended, or with `compile=False`."
            )
        buffers = SlotBuffers() if engine is None else engine.buffers
        window = doubled if self.needs.is_exact else windowed
        texts = SlotTexts(rows, buffers, self.target_engine.pattern(forward.target), False, window)
        chunks = InvariantSteps(forward, texts, self.needs, self.code, None if self.needs.is_exact else engine)
        steps = ExactSteps(chunks, self.code, engine) if self.needs.is_exact else chunks
        return SlotVerifier(forward, texts, steps, engine, TextReader(chunks, engine is not None).read, gives_back)


class InvariantCalls:
    """Remembers the settings, the filled caches and the compiled code of one model's `invariant=True` calls."""

    def __init__(self, engine: SlotEngine) -> None:
        self._engine, self.code, self._row_classes = engine, ModelCode(), RowClasses()
        self._filled: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()  # cache -> filled positions
        self._first = dict[str, Any]()  # settings of the first call
        self._warned = set[str]()
        self._has_same_bits = False  # whether `check_same_bits` has passed

    def admit(
        self,
        model: PreTrainedModel,
        setting: Callable[[str], Any],
        arguments: Mapping[str, Any],
        media: Sequence[str] = (),
        compile: bool | str | None = None,
    ) -> None:
        """Raise a `ValueError` for a target or a call whose text could depend on its drafts.

        Warn once for each setting that may change rounding and differs from the first call's. `setting` maps the name
        of a generation setting to the value that `generate` resolves. `media` names the arguments that hold images,
        sounds or embeddings of prompts.
        """
        call = _of_call(setting, arguments, media, compile)
        for came, way_out in chain(_of_model(model), _of_weights(model, compile), _of_layers(model), call):
            raise ValueError(f"`invariant=True` does not support {came}. {way_out}, or pass `invariant=False`.")
        cache = given_cache(arguments)
        if cache is not None and cached_length(cache) > self._filled.get(cache, 0):  # it may have been cropped
            raise ValueError(
                f"`invariant=True` goes on from a cache that only such calls of this model have filled, and this "
                f"`{type(cache).__name__}` has other entries. Pass one that such a call returned, itself and no copy, "
                "or leave it out."
            )
        odd = sorted({str(part.dtype) for part in parts_of(self._engine.pattern(model))} - {str(model.dtype)})
        if odd:  # cache entries of another dtype: autocast runs inside the forward
            raise ValueError(
                f"`invariant=True` does not support a forward that computes in {odd} with weights in {model.dtype}, "
                "as under autocast. Use the model as it was loaded, or pass `invariant=False`."
            )
        if not self._has_same_bits:
            mode = InvariantMode(self._engine, self.code, possible_needs(model.device)[-1])
            check_same_bits(model, lambda positions: mode.verifier(TargetForward.of(model), positions))
            self._has_same_bits = True
        self._compare(model, compile)

    def mode(self, target: PreTrainedModel, *, compiles: bool = False) -> InvariantMode:
        """Make the mode of one call; raise a `ValueError` if no number of rows makes kernels round each row alike."""
        return InvariantMode(self._engine, self.code, self._needs(target, compiles=compiles), compiles)

    def _needs(self, target: PreTrainedModel, *, compiles: bool) -> RowNeeds:
        if not compiles or target.device.type != "cpu":
            return self._row_classes.needs(target)
        needs = self._row_classes.needs_of_experts(target)  # our kernels multiply all else
        if needs.is_exact:
            raise ValueError(
                "`compile=True` with `invariant=True` cannot run: the experts of this model round by the number of "
                "rows here. Leave out `compile`."
            )
        if not keeps_rows_apart(target.dtype):
            raise ValueError(
                f"`compile=True` with `invariant=True` cannot run in {target.dtype} here: only kernels of ours keep "
                "rows apart, in bfloat16 on CPUs with AVX512-BF16. Leave out `compile`."
            )
        return needs

    def note(self, cache: Cache, is_invariant: bool) -> None:
        """Remember whether the call that filled `cache` ran with `invariant=True`."""
        self._filled.pop(cache, None)
        if is_invariant:
            self._filled[cache] = cached_length(cache)

    def _compare(self, model: PreTrainedModel, compile: bool | str | None) -> None:
        own = {"the dtype": model.dtype, "`prepack`": is_prepacked(model), "`compile`": bool(compile)}
        now = kernel_settings() | own
        self._first = self._first or now
        for name, value in now.items():
            if value != self._first[name] and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"Texts of `invariant=True` are the same where {name} is: it was {self._first[name]} in this "
                    f"model's first such call and is {value} now, so texts of then and now may differ."
                )
