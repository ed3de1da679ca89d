"""Choose how a call is decoded, from its request and from the arguments that Transformers has prepared."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, LogitsProcessorList, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from ..compat import CACHE_KEYWORD
from ..compilation.few_bits import unread_weights
from ..decoding.processors import is_stateless
from ..decoding.text import Batch, Text
from ..drafting import DraftSource
from ..policies.base import Policy
from ..verifying.cache import cached_length
from ..verifying.forward import (
    EncoderDecoderForward,
    TargetForward,
    counts_slots,
    gives_hidden_states,
    is_compiled,
    skips_positions,
)
from ..verifying.growing import GrowingMode
from ..verifying.hybrids import is_recurrent
from ..verifying.masks import longrope_boundary
from ..verifying.returned import dynamic_copy
from ..verifying.slots.verifier import SlotMode
from ..verifying.verifier import VerifyingMode
from .checks import (
    NEVER_READ,
    check_forward_arguments,
    check_lengths,
    check_needs_compiled,
    check_room,
    check_static,
    check_synced,
    holds_more_than_tokens,
    placeholder_ids,
)
from .keywords import AUTO
from .request import Request, SpeculationState


# Arguments of Transformers' decoding methods that our decoding does not use.
_NOT_OURS = NEVER_READ | {"synced_gpus", "assistant_model", "assistant_tokenizer", "tokenizer"}
NO_CODE_YET = "no code lies ready"  # the reason for eager steps while another process compiles


@dataclass(frozen=True)
class Prepared:
    """Arguments of Transformers' decoding method; if `static` is a cache, `model_kwargs` has a dynamic copy of it."""

    target: PreTrainedModel
    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: Any
    streamer: Any
    model_kwargs: dict[str, Any]
    static: StaticCache | None

    @property
    def cache(self) -> Any:
        """The cache of the target's decoder."""
        return self.model_kwargs[CACHE_KEYWORD]

    @property
    def attention_mask(self) -> Tensor | None:
        """Mask `[b, s]` over cached positions and prompt; `None` if there is no padding."""
        return self.model_kwargs["attention_mask"]

    @property
    def position_ids(self) -> Tensor:
        """Positions `[b or 1, s]`, or `[planes, b or 1, s]` if each token has several positions (M-RoPE)."""
        return self.model_kwargs["position_ids"]

    def forward(self, sources: Sequence[DraftSource]) -> TargetForward:
        """Return a wrapper that runs the target and also returns the hidden states (features) that `sources` read."""
        layers = sorted({layer for source in sources for layer in source.feature_layers})
        before = any(source.before_deepstack for source in sources if source.feature_layers)
        return TargetForward(self.target, layers or None, self.cache, before_deepstack=before)

    def sources(self) -> list[list[int]] | None:
        """Return each row's encoder input, in which lookup may search; `None` if there is none or it is unusable."""
        return None

    def never_drafted(self) -> frozenset[int]:
        """Return the ids that lookup must not propose, such as placeholders of images."""
        return placeholder_ids(self.target.config)

    @property
    def max_length(self) -> int:
        """Maximum length of a text, in tokens; `sys.maxsize` if there is no limit."""
        most: float = self.config.max_length
        return math.ceil(most) if most < sys.maxsize else sys.maxsize

    @property
    def is_cache_given(self) -> bool:
        """Whether the caller passed the cache, and so may use it again after the call."""
        given = self.model_kwargs[CACHE_KEYWORD] if self.static is None else self.static
        return bool(getattr(given, "_is_user_defined", False))

    @property
    def returns_dict(self) -> bool:
        """Whether `generate` returns an object with more than tokens, such as the cache."""
        return bool(self.config.return_dict_in_generate)

    @property
    def makes_cache(self) -> bool:
        """Whether the call returns a cache of several rows, and the caller did not pass this cache."""
        return self.returns_dict and len(self.input_ids) > 1 and not self.is_cache_given

    @property
    def keeps_scores(self) -> bool:
        return self.returns_dict and bool(self.config.output_scores)

    @property
    def keeps_logits(self) -> bool:
        return self.returns_dict and bool(self.config.output_logits)

    def text(self, input_ids: Tensor) -> Text:
        """Make the `Text` that begins with `input_ids` `[b, s]`: all rows of the call, or one row."""
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
            stops_at_ends=self.makes_cache and len(input_ids) > 1,
        )


@dataclass(frozen=True)
class PreparedEncoderDecoder(Prepared):
    """The arguments of the decoding method of an encoder-decoder, whose encoder has already read `source`."""

    source: Tensor | None  # [b or fewer, ...]; fewer if several rows of the batch have the same source

    @property
    def cache(self) -> Any:
        return self.model_kwargs[CACHE_KEYWORD].self_attention_cache

    @property
    def attention_mask(self) -> Tensor | None:
        return self.model_kwargs.get("decoder_attention_mask")

    @property
    def position_ids(self) -> Tensor:
        """Indices `[1, s]` in the cache, from which the decoder computes its positions."""
        past, length, mask = cached_length(self.cache), self.input_ids.shape[1], self.attention_mask
        known = getattr(self.config, "_mask_length", -1) if mask is None else mask.shape[1]
        return torch.arange(length if known == length else past + length, device=self.input_ids.device)[None]

    @property
    def is_cache_given(self) -> bool:
        """Whether the caller passed the cache, or gets one of several rows, which must hold finished rows' padding."""
        return super().is_cache_given or (self.returns_dict and len(self.input_ids) > 1)

    @property
    def encoded(self) -> tuple[Any, Tensor | None]:
        """The encoder's outputs, and the padding mask of its input."""
        outputs = self.model_kwargs["encoder_outputs"]
        if not isinstance(outputs, ModelOutput):
            outputs = BaseModelOutput(last_hidden_state=outputs[0])
        return outputs, self.model_kwargs.get("attention_mask")

    def forward(self, sources: Sequence[DraftSource]) -> TargetForward:
        return EncoderDecoderForward(self.target, self.model_kwargs[CACHE_KEYWORD], *self.encoded)

    def sources(self) -> list[list[int]] | None:
        """Return the encoder's input tokens of each row; `None` if the sizes of the two vocabularies differ."""
        source, mask = self.source, self.model_kwargs.get("attention_mask")
        if source is None or source.is_floating_point() or source.dim() != 2 or int(source.min()) < 0:
            return None  # -100 marks tokens that are unknown: only the encoder's outputs are given
        sides: list[Any] = [self.target.get_encoder(), self.target.get_decoder()]
        if len({side.get_input_embeddings().weight.shape[0] for side in sides}) > 1:
            return None
        tokens = source.repeat_interleave(len(self.input_ids) // len(source), dim=0)
        shown = torch.ones_like(tokens) if mask is None or mask.shape != tokens.shape else mask
        return [row[seen].tolist() for row, seen in zip(tokens, shown.bool(), strict=True)]

    def never_drafted(self) -> frozenset[int]:
        """Return the ids of placeholders and of padding: M2M100 and others give padding no position."""
        padding = self.target.config.get_text_config(decoder=True).pad_token_id
        return placeholder_ids(self.target.config) | ({padding} if isinstance(padding, int) else frozenset())


def prepare(
    target: PreTrainedModel,
    state: SpeculationState,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Prepared:
    """Check and collect the arguments that Transformers passes to a decoding method.

    `inputs_tensor` `[b, ...]` is the encoder's input in an encoder-decoder.
    """
    check_synced(model_kwargs.get("synced_gpus"))
    model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _NOT_OURS}
    check_forward_arguments(target, input_ids, model_kwargs)
    cache = model_kwargs[CACHE_KEYWORD]
    static = cache if isinstance(cache, StaticCache) else None
    if static is not None:  # verifying a tree needs a dynamic cache or our own buffers
        model_kwargs[CACHE_KEYWORD] = dynamic_copy(static, target.config)
    given = target, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs, static
    prepared = Prepared(*given)
    if target.config.is_encoder_decoder:
        prepared = encoded = PreparedEncoderDecoder(*given, inputs_tensor)
        state.check_trees(target, partial(EncoderDecoderForward.of_first, target, *encoded.encoded))
    length, positions = input_ids.shape[1], prepared.position_ids.shape[-1]
    if model_kwargs.get("inputs_embeds") is None:
        check_lengths(target, prepared.cache, length, positions, prepared.max_length)
    if static is not None and prepared.is_cache_given:
        check_room(static, prepared.max_length + positions - length - 1)
    return prepared


@dataclass(frozen=True, slots=True)
class Plan:
    """All choices about how one call is decoded.

    One choice is made later, for each step: the step runs eagerly if another call is using the compiled code.
    """

    request: Request
    prepared: Prepared
    policy: Policy
    sources: tuple[DraftSource, ...]  # the sources that draft in this call; empty if the policy wants none
    forward: TargetForward  # uses the call's cache and returns the features that the sources read
    in_lockstep: bool  # whether all rows advance by the same number of tokens
    drops_finished: bool  # whether finished rows are left out of further work
    mode: VerifyingMode  # how trees are verified
    why_eager: str | None  # why steps do not run compiled; None if they do
    warns: bool  # whether to warn of `why_eager`, since the caller asked to compile
    stock_reads: bool  # whether Transformers' own code runs the target over the prompt, not the verifier
    prompt_options: dict[str, Any]  # options of the target's forward over the prompt, beside `model_kwargs`

    @property
    def compiles(self) -> bool:
        return self.why_eager is None

    @property
    def waits(self) -> bool:
        """Whether the call waits until missing code is compiled."""
        return self.request.compile != AUTO

    @property
    def lacks_code(self) -> bool:
        """Whether steps run eagerly only because no compiled code is ready."""
        return self.why_eager == NO_CODE_YET

    def batch(self) -> Batch:
        """Make the batch: one `Text` of all rows in lockstep, else one `Text` for each row."""
        ids = self.prepared.input_ids
        texts = map(self.prepared.text, [ids] if self.in_lockstep else ids.split(1))
        return Batch(list(texts), drops_finished=self.drops_finished)

    def __str__(self) -> str:
        """Return one line: mode, reader of the prompt, how rows advance, number of sources, why steps are eager."""
        reader = "stock `generate`" if self.stock_reads else "the verifier"
        rows = "in lockstep" if self.in_lockstep else "apart"
        return f"{self.mode} | {reader} | {rows} | {len(self.sources)} | {self.why_eager or 'compiled'}"


def plan(request: Request, prepared: Prepared, state: SpeculationState) -> Plan:
    """Choose how a checked call is decoded; `state` holds code that is already compiled.

    Raises a `ValueError` if the call's options exclude each other, or if its target does not support them.
    """
    target = prepared.target
    in_lockstep, drops = _rows(request.lockstep, prepared)
    is_static = prepared.static is not None or is_compiled(target)
    if is_static:
        check_static(target)
    forward = prepared.forward(request.sources)
    why_eager, warns = _compiling(request, prepared, state, forward.layers)
    stock_reads = _has_to_read(prepared)
    mode: VerifyingMode = GrowingMode()
    if request.invariant:
        if warns:  # eager steps would round differently
            raise ValueError(f"`compile=True` with `invariant=True` cannot run: {why_eager}. Leave out `compile`.")
        mode = state.invariant_calls.mode(target, compiles=why_eager is None)
    elif why_eager is None or (is_static and gives_hidden_states(target, forward.layers)):
        options = prepared.config.compile_config
        options = None if options is None or options == CompileConfig() else options.to_dict()
        mode = SlotMode(options, stock_reads=stock_reads)
    reading_all = [source for source in request.sources if source.feature_layers and not source.reads_target]
    skips = skips_positions(target) and bool(reading_all)
    kept = {"logits_to_keep": torch.tensor([-1])} if skips else {}  # the integer 1 would skip features, too
    assert isinstance(request.policy, Policy)  # `Request.admitted` loaded it
    sources, (rows, length) = request.sources, prepared.input_ids.shape
    if why_eager is not None:  # leave out sources whose compiled code is not ready yet; refuse them if there is none
        check_needs_compiled(sources, None if why_eager == NO_CODE_YET else why_eager)
        sources = tuple(source for source in sources if not source.needs_compiled)
    unread = rows * max(length - cached_length(prepared.cache), 1)
    if sources and not request.policy.wants_head(rows, unread, prepared.max_length - length):
        sources = ()
    ways = in_lockstep, drops, mode, why_eager, warns, stock_reads, kept
    return Plan(request, prepared, request.policy, sources, forward, *ways)


def _compiling(
    request: Request, prepared: Prepared, state: SpeculationState, layers: list[int]
) -> tuple[str | None, bool]:
    """Return why steps are not compiled (`None` if they are), and whether to warn the caller of the reason."""
    target, choice, engine = prepared.target, request.compile, state.slot_engine
    if choice is None:
        # as Transformers would: on CUDA with a static cache, or by a `compile_config`
        is_static = prepared.static is not None and target.device.type == "cuda"
        choice = not prepared.config.disable_compile and (is_static or prepared.config.compile_config is not None)
    if not choice:
        return "nothing asks for it", False
    is_batch = len(prepared.input_ids) > 1
    obstacle = _compile_obstacle(target, layers)
    if obstacle is not None:
        return obstacle, choice is True
    if choice == AUTO and target.device.type == "cpu" and not engine.is_stored(target, is_batch=is_batch):
        return NO_CODE_YET, False
    return ("the caller compiled the model" if is_compiled(target) else None), False


def _compile_obstacle(target: PreTrainedModel, layers: list[int]) -> str | None:
    """Return why a forward that returns the hidden states `layers` cannot be compiled here; `None` if it can."""
    weights = list(target.parameters())
    is_elsewhere = len({weight.device for weight in weights}) != 1 or target.device.type not in ("cpu", "cuda")
    is_in_graph = is_recurrent(target) and target.device.type != "cpu"
    unread = unread_weights(target)
    obstacles = {
        "the model is in training mode": target.training,
        "the model has recurrent layers, and its states would have to stay where they are in a graph": is_in_graph,
        "the head reads the last layer's output, which a compiled forward gives only after the final norm": (
            not gives_hidden_states(target, layers)
        ),
        "the model is an encoder-decoder": target.config.is_encoder_decoder,
        "an adapter is active; merge it first": _has_active_adapter(target),
        "the model is not on one CPU or CUDA device": is_elsewhere,
        f"its weights are quantized or sharded, and compiled steps do not read {', '.join(unread)} "
        f"in {target.dtype} here": bool(unread),
        "gradients are enabled": torch.is_grad_enabled(),
    }
    return next((obstacle for obstacle, stands in obstacles.items() if stands), None)


def _has_active_adapter(target: nn.Module) -> bool:
    layers: list[Any] = list(target.modules())
    tuners = {kind for kind in set(map(type, layers)) if any(own.__name__ == "BaseTunerLayer" for own in kind.__mro__)}
    return any(type(layer) in tuners and not (layer.merged or layer.disable_adapters) for layer in layers)


def _has_to_read(prepared: Prepared) -> bool:
    """Return whether Transformers' own prefill must run: for media, encoders and, always, EXAONE 4.5."""
    config = prepared.target.config
    if config.is_encoder_decoder or holds_more_than_tokens(prepared.model_kwargs):
        return True
    return config is not config.get_text_config(decoder=True) and not is_compiled(prepared.target)


def _rows(lockstep: bool | None, prepared: Prepared) -> tuple[bool, bool]:
    """Return whether all rows gain equally many tokens per step, and whether steps leave out finished rows."""
    if len(prepared.input_ids) == 1:
        return True, False
    reason = _lockstep_reason(prepared)
    of_target = "a decoder that counts the slots of its cache" if counts_slots(prepared.target) else None
    in_lockstep = is_lockstep(lockstep, prepared.config.do_sample, reason or of_target)
    return in_lockstep, not in_lockstep or reason is None


def is_lockstep(lockstep: bool | None, do_sample: bool, reason: str | None) -> bool:
    """Whether all rows gain equally many tokens per step, as a `reason` requires or the caller's `lockstep` says.

    With `lockstep=None` only sampled rows do so, since plain sampling draws random numbers for all rows together.
    """
    if lockstep is False and reason is not None:
        raise ValueError(f"`lockstep=False` does not work with {reason}. Leave out `lockstep`, or what requires it.")
    return reason is not None or (do_sample if lockstep is None else lockstep)


_CRITERIA_BY_ROW = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})


def _lockstep_reason(prepared: Prepared) -> str | None:
    """Return which part of the call may read all rows at once, and so needs rows of equal length; `None` if none."""
    for processor in prepared.logits_processor:
        if not is_stateless(processor):
            return f"the logits processor {type(processor).__name__}, which may look at all rows at once"
    kinds = {type(criterion).__name__ for criterion in prepared.stopping_criteria}
    for criterion in prepared.stopping_criteria:
        if not is_stateless(criterion, _CRITERIA_BY_ROW):
            return f"the stopping criterion {type(criterion).__name__}, which may look at all rows at once"
    if "EosTokenCriteria" not in kinds and kinds != {"MaxLengthCriteria"}:
        return "stopping criteria without an end token, after which finished rows go on"
    asked = {
        "`output_scores`": prepared.keeps_scores,
        "`output_logits`": prepared.keeps_logits,
        "a streamer": prepared.streamer is not None,
        "a cache of your own": prepared.is_cache_given,
    }
    for name, is_asked in asked.items():
        if is_asked:
            return f"{name}, for all rows at once"
    if longrope_boundary(prepared.target.config) is not None:
        return "a target of rope_type 'longrope', whose frequencies depend on the longest row"
    return None
