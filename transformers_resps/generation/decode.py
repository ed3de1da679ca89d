"""Run the decoding loop of one `generate` call, as its `Plan` says."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from ..compat import CACHE_KEYWORD
from ..decoding.loop import TreeDecoding
from ..decoding.text import Batch
from ..drafting import DraftCall, Drafter
from ..drafting.mixed_drafter import together
from ..drafting.prompt_lookup import LookupDrafter
from ..drafting.source import LevelSource
from ..drafting.suffix_memory import SuffixMemory
from ..telemetry import SpeculationReport
from ..verifying.cache import stop_recording
from ..verifying.forward import Features
from ..verifying.lending import evaluation_mode
from ..verifying.prepacking import is_prepacked
from ..verifying.returned import EndedRow, UnreadDynamicCache, UnreadStaticCache, fill_static, whole_cache
from ..verifying.rows import leading_pads
from ..verifying.verifier import Verifier
from .keywords import MTP
from .plan import Plan, Prepared
from .request import SpeculationState


def decode(plan: Plan, state: SpeculationState) -> tuple[Batch, SpeculationReport, Cache | None]:
    """Decode all texts; return them, the report, and the cache for the caller (`None` if it gets only tokens)."""
    prepared, request, policy = plan.prepared, plan.request, plan.policy
    target, batch = prepared.target, plan.batch()
    with ExitStack() as stack:
        if prepared.static is not None and prepared.is_cache_given:
            stack.callback(fill_static, prepared.static, prepared.cache)
        stack.callback(state.invariant_calls.note, prepared.cache, request.invariant)
        stack.callback(stop_recording, prepared.cache)
        verifier = stack.enter_context(_verifier(plan, state, stack))
        drafter, lookup = _drafters(plan, state, batch, verifier, stack)
        options: dict[str, Any] = {"max_length": prepared.max_length, "keeps_ended": prepared.makes_cache}
        decoding = TreeDecoding(verifier, drafter, lookup, policy, batch, **options)
        decoding.prefill(_reader(plan, verifier))
        threads = torch.get_num_threads() if target.device.type == "cpu" else 1
        setting = target.dtype, threads, verifier.is_compiled, request.invariant, state.compiler.is_running
        with cast(Any, target)._optimize_model_for_decode():
            while not batch.finished:
                context = verifier.length
                decoding.step()
                state.pace.see(decoding.report.steps[-1], context, threads, setting)
        # most callers never read the cache, so it is filled when it is read
        is_filled_now = prepared.is_cache_given or prepared.static is not None or request.invariant or decoding.ended
        cache = verifier.unread_cache() if prepared.returns_dict and not is_filled_now else None
    report = decoding.report
    report.reason, report.why_eager = policy.explain(report.steps), plan.why_eager
    if plan.compiles and (state.slot_engine.is_broken or not verifier.is_compiled):
        report.why_eager = state.slot_engine.obstacle or "another call uses the compiled code"
    report.answers = batch.input_ids[:, prepared.input_ids.shape[1] :].tolist()
    if plan.lacks_code or (not plan.waits and (state.slot_engine.lacks_code or state.draft_engines.lack_code)):
        _compile_beside(plan, state)
    if plan.request.memories:
        _remember(plan.request.memories[0], prepared, report)
    if cache is None and prepared.returns_dict:
        cache = _returned_cache(prepared, decoding.ended, batch.input_ids)
    return batch, report, cache


def _compile_beside(plan: Plan, state: SpeculationState) -> None:
    """Start a process that compiles the code that this call lacked, for later calls."""
    target = plan.prepared.target
    identity = state.slot_engine.identity(target)
    if identity is None:
        return
    sources = [one for one in plan.request.sources if isinstance(one, LevelSource) or one.needs_compiled]
    names = [source.identity()["name_or_path"] for source in sources]
    heads = [MTP if name == target.name_or_path else name for name in names if name]
    dtype, rows = str(target.dtype).removeprefix("torch."), min(len(plan.prepared.input_ids), 2)
    options = ["--dtype", dtype, "--threads", str(torch.get_num_threads()), "--rows", str(rows)]
    options += ["--pack"] if is_prepacked(target) else []
    quantizer = getattr(target, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:  # the checkpoint holds the weights before quantization
        options += ["--quantization", json.dumps(quantizer.quantization_config.to_dict(), default=str)]
    state.compiler.start(identity, target.name_or_path or "", *heads, *options)


def _verifier(plan: Plan, state: SpeculationState, stack: ExitStack) -> Verifier:
    """Make the verifier, which runs the target over trees. Closing `stack` lets other calls use the compiled code."""
    engine, prepared = state.slot_engine, plan.prepared
    if plan.warns:
        engine.warn(str(plan.why_eager))
    lent = stack.enter_context(engine.borrow(prepared.target, waits=plan.waits)) if plan.compiles else None
    gives_back = prepared.returns_dict or prepared.is_cache_given
    given = plan.forward, prepared.position_ids, prepared.attention_mask, lent
    return plan.mode.verifier(*given, gives_back=gives_back)


def _drafters(
    plan: Plan, state: SpeculationState, batch: Batch, verifier: Verifier, stack: ExitStack
) -> tuple[Drafter | None, LookupDrafter]:
    prepared, mask = plan.prepared, plan.prepared.attention_mask
    call = DraftCall(
        prepared.target,
        verifier,
        len(batch),
        # the mask also covers cached positions, which may have no tokens in the batch
        text_mask=None if mask is None or not batch.length else mask[:, mask.shape[1] - batch.length :],
        # without cached positions, which have no features, and embeddings, which have no tokens
        paired_mask=None if mask is None else mask[:, verifier.length :][:, -batch.length - 1 :],
        origins=prepared.sources(),
        never_drafted=prepared.never_drafted(),
        engines=state.draft_engines if verifier.is_compiled else None,
        waits=plan.waits,
        ends=stack,
    )
    lookup = LookupDrafter.of_call(call, plan.request.memories)
    return together([source.drafter(call) for source in plan.sources]), lookup


def _remember(memory: SuffixMemory, prepared: Prepared, report: SpeculationReport) -> None:
    counts = [sum(emitted) for emitted in zip(*(step.emitted for step in report.steps), strict=True)]
    answers = [answer[:count] for answer, count in zip(report.answers, counts, strict=True)]
    prompts, mask = prepared.input_ids, prepared.attention_mask
    pads = [0] * len(prompts) if mask is None else leading_pads(mask[:, mask.shape[1] - prompts.shape[1] :])
    memory.remember([row[start:] for row, start in zip(prompts.tolist(), pads, strict=True)], answers)


def _reader(plan: Plan, verifier: Verifier) -> Callable[[Tensor], tuple[Tensor, list[Features]]]:
    """Return a function that runs the target over the prompt `[b, s]`, by the verifier's or Transformers' code."""
    prepared, kwargs = plan.prepared, plan.prepared.model_kwargs | plan.prompt_options
    if not plan.stock_reads:
        kept = {"logits_to_keep": kwargs["logits_to_keep"]} if "logits_to_keep" in kwargs else {}
        return partial(verifier.prefill, chunk_size=prepared.config.prefill_chunk_size, **kept)
    is_first = not prepared.config.is_assistant  # an assistant reads the images in its first call only
    # `kwargs` is a copy: `_prefill` changes its arguments when it reads in chunks
    run = partial(cast(Any, prepared.target)._prefill, prepared.input_ids, prepared.config, kwargs, is_first)
    return lambda tokens: verifier.prefill_by(run, len(tokens))


def _returned_cache(prepared: Prepared, ended: dict[int, EndedRow], tokens: Tensor) -> Cache:
    """Return the cache that plain decoding would return: with all rows, and static if the caller asked for that."""
    cache, static = prepared.model_kwargs[CACHE_KEYWORD], prepared.static
    if not ended:
        return cache if static is None else fill_static(static, cache)
    target, mask = prepared.target, prepared.attention_mask

    def make() -> Cache:
        with evaluation_mode(target):
            whole = whole_cache(target, [ended[row] for row in range(len(tokens))], tokens, mask)
        return whole if static is None else fill_static(static, whole)

    return UnreadDynamicCache(make) if static is None else UnreadStaticCache(make)
