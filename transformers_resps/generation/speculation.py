"""Decode one call: from what stock `generate` has prepared to what it returns."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    CompileConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from ..compat import CACHE_KEYWORD
from ..decoding.loop import TreeDecoding
from ..decoding.processors import is_stateless
from ..decoding.text import Batch, Text
from ..drafting import DraftCall, Drafter, DraftSource
from ..drafting.mixed_drafter import together
from ..drafting.prompt_lookup import LookupDrafter, PromptLookup
from ..verifying.attention import longrope_boundary
from ..verifying.cache import cached_length, stop_recording
from ..verifying.forward import (
    EncoderDecoderForward,
    Features,
    TargetForward,
    are_outputs,
    counts_slots,
    is_compiled,
    skips_positions,
)
from ..verifying.hybrids import is_recurrent
from ..verifying.returned import UnreadDynamicCache, UnreadStaticCache, dynamic_copy, fill_static, whole_cache
from ..verifying.verifier import HybridVerifier, InvariantVerifier, SlotVerifier, TreeVerifier, Verifier
from .checks import (
    NEVER_READ,
    check_forward_arguments,
    check_lengths,
    check_room,
    check_synced,
    holds_more_than_tokens,
    placeholder_ids,
)
from .output import SpeculativeOutput, SpeculativeSeq2SeqOutput
from .request import AUTO, Request, SpeculationState


# What stock decoding methods are told and a tree has no use for.
_NOT_OURS = NEVER_READ | {"synced_gpus", "assistant_model", "assistant_tokenizer", "tokenizer"}


def speculate(
    target: PreTrainedModel,
    state: SpeculationState,
    request: Request,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> SpeculativeOutput | SpeculativeSeq2SeqOutput | Tensor:
    """Stand in for a decoding method of stock `generate`, which has merged processors, criteria and config.

    Args:
        target: the model, whose `state` it is.
        state: lends compiled code.
        request: what the caller asked for beyond stock.
        input_ids: `[b, s]` the prompts.
        logits_processor: all of the call.
        stopping_criteria: all of the call.
        generation_config: of the call.
        streamer: gets each token; `None` for none.
        inputs_tensor: what the encoder of an encoder-decoder has read, `[b, ...]`.
        model_kwargs: cache, mask and positions; whatever else the target's forward takes.

    Returns:
        `[b, s + t]` token ids, or a `SpeculativeOutput` where the config asks for a dict.

    Raises:
        ValueError: the call has what a tree cannot take.
    """
    with ExitStack() as stack:
        check_synced(model_kwargs.get("synced_gpus"))
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _NOT_OURS}
        check_forward_arguments(target, input_ids, model_kwargs)
        cache = model_kwargs[CACHE_KEYWORD]
        static = cache if isinstance(cache, StaticCache) else None
        if static is not None:  # trees decode over slots, or where the cache grows
            model_kwargs[CACHE_KEYWORD] = dynamic_copy(static, target.config)
        given = input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs, static
        inputs = GenerateInputs(*given)
        if target.config.is_encoder_decoder:
            inputs = encoded = EncoderDecoderInputs(*given, inputs_tensor)
            state.check_trees(target, partial(EncoderDecoderForward.of_first, target, *encoded.encoded))
        if model_kwargs.get("inputs_embeds") is None:
            positions = inputs.position_ids.shape[-1]
            check_lengths(target, inputs.cache, input_ids.shape[1], positions, inputs.max_length)
        if static is not None and inputs.is_cache_given:
            check_room(static, inputs.longest - 1)
            stack.callback(fill_static, static, inputs.cache)
        stack.callback(state.invariant_calls.note, inputs.cache, request.invariant)
        stack.callback(stop_recording, inputs.cache)
        batch = _batch(target, request.lockstep, inputs)
        decoding, unread = _decode(target, state, request, batch, inputs)
    if streamer is not None:
        streamer.end()  # of a whole answer only, as in stock: who calls tells the reader of an error
    report = decoding.report
    report.answers = batch.answers(input_ids.shape[1])
    if not generation_config.return_dict_in_generate:
        return batch.input_ids
    kept: dict[str, Any] = {"sequences": batch.input_ids, "scores": batch.scores, "logits": batch.logits}
    kept[CACHE_KEYWORD] = _returned_cache(target, state, decoding, inputs) if unread is None else unread
    made = SpeculativeSeq2SeqOutput if target.config.is_encoder_decoder else SpeculativeOutput
    return made(**kept, speculation=report)


def _decode(
    target: PreTrainedModel, state: SpeculationState, request: Request, batch: Batch, inputs: "GenerateInputs"
) -> tuple[TreeDecoding, Cache | None]:
    """Prefill, then one step after another until all texts are finished. Returns also the cache to hand back where it
    is filled when someone looks at it.
    """
    assert request.policy is not None
    with (
        _verifier(target, state, request, inputs) as verifier,
        ExitStack() as lent,
    ):
        drafter, lookup = _drafters(target, state, request, batch, inputs, verifier, lent)
        decoding = TreeDecoding(
            verifier,
            drafter,
            lookup,
            request.policy,
            batch,
            max_length=inputs.max_length,
            keeps_ended=inputs.makes_cache,
        )
        verifier.gives_back = inputs.cache_is_read
        decoding.prefill(_reader(target, verifier, request, inputs))
        threads = torch.get_num_threads() if target.device.type == "cpu" else 1
        settings = target.dtype, threads, verifier.is_compiled, request.invariant
        pace = state.pace.of_call(settings, threads)
        with cast(Any, target)._optimize_model_for_decode():
            while not batch.finished:
                context = verifier.length
                decoding.step()
                pace.see(decoding.report.steps[-1], context)
        waits = inputs.cache_can_wait and not request.invariant and not decoding.ended
        unread = verifier.unread_cache() if waits else None
    decoding.report.reason = request.policy.explain(decoding.report.steps)
    state.slot_engine.note(decoding.report.seconds)
    return decoding, unread


def _drafters(
    target: PreTrainedModel,
    state: SpeculationState,
    request: Request,
    batch: Batch,
    inputs: "GenerateInputs",
    verifier: Verifier,
    ends: ExitStack,
) -> tuple[Drafter | None, LookupDrafter]:
    """What drafts in this call, and the lookup beside it."""
    sources, mask = request.sources, inputs.attention_mask
    unread = len(batch) * max(batch.length - verifier.length, 1)
    assert request.policy is not None
    if sources and not request.policy.wants_head(len(batch), unread, inputs.max_length - batch.shortest):
        sources = ()
    call = DraftCall(
        target,
        verifier,
        len(batch),
        # the mask counts what the cache holds, of which the batch may know nothing
        text_mask=None if mask is None or not batch.length else mask[:, mask.shape[1] - batch.length :],
        # features begin after cached positions, whose own are gone, and where tokens are known
        paired_mask=None if mask is None else mask[:, verifier.length :][:, -batch.length - 1 :],
        origins=inputs.sources(target),
        never_drafted=inputs.never_drafted(target),
        engines=state.draft_engines if verifier.is_compiled else None,
        ends=ends,
    )
    return together([source.drafter(call) for source in sources]), PromptLookup().drafter(call)


def _returned_cache(
    target: PreTrainedModel, state: SpeculationState, decoding: TreeDecoding, inputs: "GenerateInputs"
) -> Cache:
    """The cache that plain decoding returns: of all rows, and a static one if the caller asked for that."""
    ended, tokens, prompt_mask = decoding.ended, decoding.batch.input_ids, inputs.attention_mask
    cache, static = inputs.model_kwargs[CACHE_KEYWORD], inputs.static
    if not ended:
        return cache if static is None else fill_static(static, cache)

    def make() -> Cache:
        with state.evaluation_mode.held(target):
            whole = whole_cache(target, [ended[row] for row in range(len(tokens))], tokens, prompt_mask)
        return whole if static is None else fill_static(static, whole)

    return UnreadDynamicCache(make) if static is None else UnreadStaticCache(make)


def _reader(
    target: PreTrainedModel, verifier: Verifier, request: Request, inputs: "GenerateInputs"
) -> Callable[[Tensor], tuple[Tensor, list[Features]]]:
    """What reads the prompt `[b, s]`: the verifier, or stock `generate` where it holds more than tokens.

    Stock, too, where a decoder's prompt could hold more: EXAONE 4.5 reads other positions than it is given.
    """
    kwargs, config = inputs.model_kwargs, target.config
    reading = [source for source in request.sources if source.feature_layers]
    if skips_positions(target) and not all(source.reads_target for source in reading):
        kwargs = kwargs | {"logits_to_keep": torch.tensor([-1])}  # a number skips the features, too
    may_hold_more = not config.is_encoder_decoder and config is not config.get_text_config(decoder=True)
    if not inputs.hold_more_than_tokens and (not may_hold_more or is_compiled(target)):
        kept = {"logits_to_keep": kwargs["logits_to_keep"]} if "logits_to_keep" in kwargs else {}
        return partial(verifier.prefill, chunk_size=inputs.config.prefill_chunk_size, **kept)
    # of a copy: stock takes apart what it reads in chunks
    run = partial(cast(Any, target)._prefill, inputs.input_ids, inputs.config, dict(kwargs))
    return lambda tokens: verifier.prefill_by(run, len(tokens))


@dataclass(frozen=True)
class GenerateInputs:
    """What stock `generate` hands to the method that decodes; see `speculate`. A dynamic cache stands for a `static`
    one.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: Any
    streamer: Any
    model_kwargs: dict[str, Any]
    static: StaticCache | None

    @property
    def cache(self) -> Any:
        """What the decoder has read."""
        return self.model_kwargs[CACHE_KEYWORD]

    @property
    def attention_mask(self) -> Tensor | None:
        """`[b, s]` of the prompt, or `None` when nothing is padded; s counts what the cache already holds."""
        return cast(Tensor | None, self.model_kwargs["attention_mask"])

    @property
    def position_ids(self) -> Tensor:
        """`[b or 1, s]`, or `[planes, b or 1, s]`."""
        return cast(Tensor, self.model_kwargs["position_ids"])

    @property
    def hold_more_than_tokens(self) -> bool:
        """Whether stock `generate` has to read the prompt."""
        return holds_more_than_tokens(self.model_kwargs)

    def forward(self, target: PreTrainedModel, sources: Sequence[DraftSource]) -> TargetForward:
        """The target's, with the features that the sources read.

        Raises:
            ValueError: they read the same layers before and after image features are added.
        """
        reading = [source for source in sources if source.feature_layers]
        layers = sorted({layer for source in reading for layer in source.feature_layers})
        before = {source.before_deepstack for source in reading}
        if len(before) > 1:
            raise ValueError(
                "One assistant reads hidden states before image features are added to them, another one after. Pass "
                "one of them."
            )
        return TargetForward(target, layers or None, self.cache, before_deepstack=True in before)

    def sources(self, target: PreTrainedModel) -> list[list[int]] | None:
        """Of each row, the tokens that its text is written from; `None` where there are none of the target's own."""
        return None

    def never_drafted(self, target: PreTrainedModel) -> frozenset[int]:
        """Tokens that lookup does not propose."""
        return placeholder_ids(target.config)

    @property
    def max_length(self) -> int:
        """Positions a text may reach: a fraction is rounded up, and no limit is `sys.maxsize`."""
        most: float = self.config.max_length
        return math.ceil(most) if most < sys.maxsize else sys.maxsize

    @property
    def longest(self) -> int:
        """Positions that the whole conversation may reach, of which the text may be the end."""
        read: int = self.model_kwargs["position_ids"].shape[-1]
        return self.max_length + read - self.input_ids.shape[1]

    @property
    def is_cache_given(self) -> bool:
        """Whether the cache is the caller's, who may reuse it."""
        given = self.model_kwargs[CACHE_KEYWORD] if self.static is None else self.static
        return bool(getattr(given, "_is_user_defined", False))

    @property
    def cache_is_read(self) -> bool:
        """Whether anyone can look at the cache when the call has ended."""
        return bool(self.is_cache_given or self.config.return_dict_in_generate)

    @property
    def cache_can_wait(self) -> bool:
        """Whether only a look at what the call returns can show it."""
        return bool(self.config.return_dict_in_generate and not self.is_cache_given and self.static is None)

    @property
    def makes_cache(self) -> bool:
        """Whether several rows get a cache back that is not the caller's."""
        return bool(self.config.return_dict_in_generate and len(self.input_ids) > 1 and not self.is_cache_given)

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
            stops_at_ends=self.makes_cache and len(input_ids) > 1,
        )


@dataclass(frozen=True)
class EncoderDecoderInputs(GenerateInputs):
    """Of an encoder-decoder, whose encoder has read `source`: `[b or fewer, ...]` tokens, or sounds or images."""

    source: Tensor | None

    @property
    def cache(self) -> Any:
        return self.model_kwargs[CACHE_KEYWORD].self_attention_cache

    @property
    def attention_mask(self) -> Tensor | None:
        return self.model_kwargs.get("decoder_attention_mask")

    @property
    def position_ids(self) -> Tensor:
        """Slots, until the decoder has got its positions."""
        past, length, mask = cached_length(self.cache), self.input_ids.shape[1], self.attention_mask
        known = getattr(self.config, "_mask_length", -1) if mask is None else mask.shape[1]
        return torch.arange(length if known == length else past + length, device=self.input_ids.device)[None]

    @property
    def is_cache_given(self) -> bool:
        """As `GenerateInputs.is_cache_given`. Of several rows a cache that is handed back is made as if it were."""
        return super().is_cache_given or bool(self.config.return_dict_in_generate and len(self.input_ids) > 1)

    @property
    def hold_more_than_tokens(self) -> bool:
        return True

    @property
    def encoded(self) -> tuple[Any, Tensor | None]:
        """The encoder's outputs, and its mask of padding."""
        outputs = self.model_kwargs["encoder_outputs"]
        if not isinstance(outputs, ModelOutput):
            outputs = BaseModelOutput(last_hidden_state=outputs[0])
        return outputs, self.model_kwargs.get("attention_mask")

    def forward(self, target: PreTrainedModel, sources: Sequence[DraftSource]) -> TargetForward:
        return EncoderDecoderForward(target, self.model_kwargs[CACHE_KEYWORD], *self.encoded)

    def sources(self, target: PreTrainedModel) -> list[list[int]] | None:
        """As `GenerateInputs.sources`: they are the target's own where encoder and decoder have as many tokens."""
        source, mask = self.source, self.model_kwargs.get("attention_mask")
        if source is None or source.is_floating_point() or source.dim() != 2 or int(source.min()) < 0:
            return None  # -100 stands for tokens of which only the encoder's outputs are known
        sides: list[Any] = [target.get_encoder(), target.get_decoder()]
        if len({side.get_input_embeddings().weight.shape[0] for side in sides}) > 1:
            return None
        tokens = source.repeat_interleave(len(self.input_ids) // len(source), dim=0)
        shown = torch.ones_like(tokens) if mask is None or mask.shape != tokens.shape else mask
        return [row[seen].tolist() for row, seen in zip(tokens, shown.bool(), strict=True)]

    def never_drafted(self, target: PreTrainedModel) -> frozenset[int]:
        """As `GenerateInputs.never_drafted`; M2M100 and others count positions without padding."""
        padding = target.config.get_text_config(decoder=True).pad_token_id
        return placeholder_ids(target.config) | ({padding} if isinstance(padding, int) else frozenset())


def _batch(target: PreTrainedModel, lockstep: bool | None, inputs: GenerateInputs) -> Batch:
    """Make one text of each row, a ragged batch, or one of all rows where they advance in lockstep."""
    if len(inputs.input_ids) == 1:
        return Batch([inputs.text(inputs.input_ids)], drops_finished=False)
    reason = lockstep_reason(target, inputs)
    of_target = "a decoder that counts the slots of its cache" if counts_slots(target) else None
    if is_lockstep(lockstep, inputs.config.do_sample, reason or of_target):
        return Batch([inputs.text(inputs.input_ids)], drops_finished=reason is None)
    return Batch([inputs.text(row) for row in inputs.input_ids.split(1)], drops_finished=True)


def is_lockstep(lockstep: bool | None, do_sample: bool, reason: str | None) -> bool:
    """Decide whether the rows of a call advance in lockstep.

    Args:
        lockstep: what the caller asks for; with `None` a greedy batch is ragged and a sampled one in lockstep, since
            plain sampling draws the random numbers of all rows at once.
        do_sample: whether tokens are drawn.
        reason: why they must, if they must.

    Raises:
        ValueError: the caller asks for a ragged batch where lockstep is required.
    """
    if lockstep is False and reason is not None:
        raise ValueError(f"`lockstep=False` does not work with {reason}. Leave out `lockstep`, or what requires it.")
    return reason is not None or (do_sample if lockstep is None else lockstep)


_CRITERIA_BY_ROW = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})


def lockstep_reason(target: PreTrainedModel, inputs: GenerateInputs) -> str | None:
    """Say what in a call requires lockstep; `None` when nothing does.

    A batch may be ragged only if nothing in the call can notice: plain decoding shows every processor and criterion
    all rows at once, at the same length. What is not known to treat each row separately requires lockstep.
    """
    for processor in inputs.logits_processor:
        if not is_stateless(processor):
            return f"the logits processor {type(processor).__name__}, which may look at all rows at once"
    kinds = {type(criterion).__name__ for criterion in inputs.stopping_criteria}
    for criterion in inputs.stopping_criteria:
        kind = type(criterion)
        if kind.__name__ not in _CRITERIA_BY_ROW or not kind.__module__.startswith("transformers.generation."):
            return f"the stopping criterion {kind.__name__}, which may look at all rows at once"
    if "EosTokenCriteria" not in kinds and kinds != {"MaxLengthCriteria"}:
        return "stopping criteria without an end token, after which finished rows go on"
    asked = {
        "`output_scores`": inputs.keeps_scores,
        "`output_logits`": inputs.keeps_logits,
        "a streamer": inputs.streamer is not None,
        "a cache of your own": inputs.is_cache_given,
    }
    for name, is_asked in asked.items():
        if is_asked:
            return f"{name}, for all rows at once"
    if longrope_boundary(target.config) is not None:
        return "a target of rope_type 'longrope', whose frequencies depend on the longest row"
    return None


@contextmanager
def _verifier(
    target: PreTrainedModel, state: SpeculationState, request: Request, inputs: GenerateInputs
) -> Iterator[Verifier]:
    """The verifier of one call, open: over a cache that grows, or over slots, compiled or not.

    Raises:
        ValueError: a recurrent target was compiled, or has to decode over a static cache.
    """
    is_static = inputs.static is not None or is_compiled(target)
    if is_static and is_recurrent(target):
        raise ValueError(
            f"{type(target).__name__} has recurrent layers and cannot verify trees over a static cache or compiled. "
            "Leave out `cache_implementation`, and use the model as it was before it was compiled."
        )
    forward = inputs.forward(target, request.sources)
    given = inputs.position_ids, inputs.attention_mask
    if request.invariant:
        with _invariant_verifier(target, state, forward, given, compiles=bool(request.compile)) as verifier:
            yield verifier
        return
    choice, engine = request.compile, state.slot_engine
    if choice is None:
        choice = _stock_would_compile(target, inputs)
    compiles = choice is True
    if choice == AUTO:
        compiles = engine.pays or engine.is_stored(target, forward.layers, is_batch=len(inputs.input_ids) > 1)
    obstacle = _compile_obstacle(target, forward.layers) if compiles else None
    if obstacle is not None and choice is True:
        engine.warn(obstacle)
    compiles = compiles and obstacle is None and not is_compiled(target)
    if not compiles and not (is_static and are_outputs(target, forward.layers)):
        with TreeVerifier(forward, *given) as verifier:
            yield verifier
        return
    kind = HybridVerifier if is_recurrent(target) else SlotVerifier
    config = inputs.config.compile_config
    options = None if config is None or config == CompileConfig() else config.to_dict()
    with (
        engine.borrow(target) if compiles else nullcontext() as lent,
        kind(forward, lent, *given, options=options) as verifier,
    ):
        yield verifier


@contextmanager
def _invariant_verifier(
    target: PreTrainedModel,
    state: SpeculationState,
    forward: TargetForward,
    given: tuple[Tensor, Tensor | None],
    *,
    compiles: bool,
) -> Iterator[InvariantVerifier]:
    """As `_verifier`. What cannot be compiled is refused: steps that run as they are round otherwise."""
    obstacle = _compile_obstacle(target, forward.layers) if compiles else None
    if obstacle is not None:
        raise ValueError(f"`compile=True` with `invariant=True` cannot run: {obstacle}. Leave out `compile`.")
    engine, classes = state.slot_engine, state.row_classes
    by_kernels_of_ours = compiles and target.device.type == "cpu"
    needs = classes.needs_of_experts(target) if by_kernels_of_ours else classes.needs(target)
    if by_kernels_of_ours and needs.is_exact:
        raise ValueError(
            "`compile=True` with `invariant=True` cannot run: the experts of this model round by the number of rows "
            "here. Leave out `compile`."
        )
    with engine.borrow(target) if compiles else nullcontext() as lent:
        if compiles and lent is None:
            raise ValueError(
                "Another call runs the compiled code of this model, and steps that are not compiled round otherwise. "
                "Call `generate` when it has ended, or with `compile=False`."
            )
        with InvariantVerifier(forward, engine, needs, *given, compiles=compiles) as verifier:
            yield verifier


def _stock_would_compile(target: PreTrainedModel, inputs: GenerateInputs) -> bool:
    """Whether plain `generate` would compile, or is told how to."""
    if inputs.config.disable_compile:
        return False
    is_static = inputs.static is not None and target.device.type == "cuda"
    return inputs.config.compile_config is not None or is_static


def _compile_obstacle(target: PreTrainedModel, layers: list[int]) -> str | None:
    """Say why a forward that keeps these feature `layers` cannot be compiled with its weights inside."""
    parameters = {(type(parameter), parameter.device) for parameter in target.parameters()}
    devices = {device for _, device in parameters}
    if target.training:
        return "the model is in training mode"
    if is_recurrent(target) and target.device.type != "cpu":
        return "the model has recurrent layers, and its states would have to stay where they are in a graph"
    if not are_outputs(target, layers):
        return "the head reads the last layer's output, which a compiled forward gives only after the final norm"
    if target.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if _has_active_adapter(target):
        return "an adapter is active; merge it first"
    if len(devices) != 1 or devices.pop().type not in ("cpu", "cuda"):
        return "the model is not on one CPU or CUDA device"
    if any(kind is not nn.Parameter for kind, _ in parameters):
        return "its weights are quantized or sharded"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    return None


def _has_active_adapter(target: nn.Module) -> bool:
    """Whether a layer of PEFT adds to the layer inside it."""
    layers: list[Any] = list(target.modules())
    tuners = {kind for kind in set(map(type, layers)) if any(own.__name__ == "BaseTunerLayer" for own in kind.__mro__)}
    return any(type(layer) in tuners and not (layer.merged or layer.disable_adapters) for layer in layers)
