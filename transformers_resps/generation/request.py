"""Combine a call's keywords with their defaults into a `Request`; keep a model's state between calls."""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from ..assistants import load_drafter, source_of
from ..compat import unwrapped
from ..compilation.beside import CompilerProcess
from ..drafting import DraftSource
from ..drafting.engine import DraftEngines
from ..drafting.suffix_memory import SuffixMemory
from ..heads import pair_identity
from ..policies.auto import PolicyCache, default_policy
from ..policies.base import Policy
from ..policies.fixed import FixedPolicy
from ..policies.saving import AutoPolicy
from ..telemetry.pace import Pace
from ..tree import TreeShape
from ..verifying.attention import is_flash
from ..verifying.forward import TargetForward
from ..verifying.invariant.calls import InvariantCalls
from ..verifying.lending import evaluation_mode
from ..verifying.slots.engine import SlotEngine
from ..verifying.unknown_targets import check_tree_attention
from .checks import (
    PROMPT_ARGUMENTS,
    check_drafter,
    check_drafts_trees,
    check_effect,
    check_inputs,
    check_keywords,
    check_model,
    check_policy,
    check_quantized,
    check_settings,
    check_sources,
    setting_of,
)
from .keywords import AUTO, MTP, PLAIN, USE_MTP, CompileChoice, Keywords, SpeculationDefaults, is_name


class Assistants:
    """Keeps the drafters of one target: loads a folder or Hub id once, wraps each model in one `DraftSource`."""

    def __init__(self) -> None:
        self._named: dict[Hashable, DraftSource | PreTrainedModel] = {}
        self._sources: WeakKeyDictionary[Any, DraftSource] = WeakKeyDictionary()

    def load(self, target: PreTrainedModel, assistant: Any, *, as_source: bool) -> Any:
        """Return `assistant`, loaded if it is a name, and as a source if `as_source`. Raises if it cannot draft."""
        if is_name(assistant):
            key = os.fspath(assistant), target.device, target.dtype
            if key not in self._named:
                self._named[key] = load_drafter(assistant, target)
            assistant = self._named[key]
        model = unwrapped(assistant)
        if not as_source or isinstance(model, DraftSource):
            return assistant
        check_drafts_trees(model)
        if model not in self._sources:
            self._sources[model] = source_of(model, target)
        return self._sources[model]

    def source(self, target: PreTrainedModel, head: Any) -> DraftSource | None:
        """Return a source for `head` (source, model, folder, Hub id; `None` for `None`). Raises if it cannot draft."""
        if head is None:
            return None
        check_drafter(head)
        return unwrapped(self.load(target, head, as_source=True))


class SpeculationState:
    """State of an attached model that is kept between calls. A copy or pickle has only the defaults."""

    def __init__(self, defaults: SpeculationDefaults | None = None) -> None:
        self.defaults = defaults or SpeculationDefaults()  # the keywords of `attach`
        self.policy_cache = PolicyCache()  # the "auto" policies and loaded policies, with what they have learned
        self.assistants = Assistants()
        self.slot_engine = SlotEngine()  # buffers and compiled code
        self.draft_engines = DraftEngines()  # captured or compiled drafting code of each living head
        self.invariant_calls = InvariantCalls(self.slot_engine)
        self.pace = Pace()  # the best seconds of each kind of step, to warn of a busy CPU
        self.compiler = CompilerProcess()  # another process, which compiles while calls with `compile="auto"` run
        self.tried_layers: WeakKeyDictionary[Module, torch.dtype] = WeakKeyDictionary()  # see `check_quantized`
        self._verified_trees = set[bool]()  # checked attentions: True for FlashAttention, else False

    def check_trees(self, model: PreTrainedModel, make_forward: Callable[[], TargetForward]) -> None:
        """Check that the model verifies trees, once for FlashAttention and once for others: `check_tree_attention`."""
        reads_by_flash = is_flash(model.config.get_text_config()._attn_implementation)
        if reads_by_flash not in self._verified_trees:
            check_tree_attention(make_forward)
            self._verified_trees.add(reads_by_flash)

    def __reduce__(self) -> tuple[type["SpeculationState"], tuple[SpeculationDefaults]]:
        return SpeculationState, (self.defaults,)


class GenerateCall(NamedTuple):
    """One call of `generate`, as its caller wrote it."""

    keywords: Keywords
    config: GenerationConfig | None
    arguments: Mapping[str, Any]  # all other keyword arguments
    prompts: Tensor | None  # [b, s]; None if only embeddings are given

    @property
    def rows(self) -> int:
        given = (value for value in (self.prompts, *self.arguments.values()) if isinstance(value, Tensor))
        return next(map(len, given), 1)

    @property
    def media(self) -> list[str]:
        """Names of the passed arguments that hold images, sounds or embeddings of the prompts."""
        return sorted(name for name in PROMPT_ARGUMENTS & self.arguments.keys() if self.arguments[name] is not None)


@dataclass(frozen=True, slots=True)
class Request:
    """The settings of one `generate` call, with all defaults applied: made by `resolve`, checked by `admitted`."""

    policy: Policy | str = PLAIN  # a name before `admitted`; "plain" if Transformers decodes
    sources: tuple[DraftSource, ...] = ()  # empty if lookup alone drafts
    memories: tuple[SuffixMemory, ...] = ()  # texts that lookup searches after the call's own, in this order
    lockstep: bool | None = None  # whether the rows of a batch advance together; None: the plan decides
    compile: CompileChoice | None = None  # whether the target's steps run compiled; None: the plan decides
    invariant: bool = False  # whether the text is independent of the drafts, also in half precision
    eval_mode: bool = False  # whether the call runs in evaluation mode
    is_plain_throughout: bool = False  # whether nested `generate` calls are plain too
    told: Mapping[str, Any] = field(default_factory=dict)  # further arguments for Transformers' `generate`

    @property
    def is_stock(self) -> bool:
        """Whether Transformers' own code decodes this call, without or with its assisted decoding."""
        return self.policy == PLAIN

    @contextmanager
    def admitted(self, target: PreTrainedModel, state: SpeculationState, call: GenerateCall) -> Iterator["Request"]:
        """Check the request; yield a copy with a loaded policy. Raises `ValueError` if trees cannot serve the call."""
        with ExitStack() as stack:
            if self.is_plain_throughout or any(source.calls_generate for source in self.sources):
                stack.enter_context(SpeculationDefaults.suspended())
            modules = [module for source in self.sources for module in source.own_modules]
            if self.eval_mode:
                stack.enter_context(evaluation_mode(target, *modules))
            if self.is_stock:
                yield self
                return
            check_model(target, has_head=bool(self.sources))
            check_quantized(target, state.tried_layers)
            check_settings(target, call.config, call.arguments)
            check_inputs(target, call.prompts, call.arguments)
            if self.invariant:
                configs, given = (call.config, target.generation_config), (call.media, self.compile)
                setting = partial(setting_of, arguments=call.arguments, configs=configs)
                state.invariant_calls.admit(target, setting, call.arguments, *given)
            check_sources(self.sources)
            for source in (*self.sources, *self.memories):
                source.prepare(target)
            policy = self._lent_policy(target, state, call.rows, stack)
            if not target.config.is_encoder_decoder:  # checked later: the encoder has not run yet
                state.check_trees(target, partial(TargetForward.of, target))
            yield replace(self, policy=policy)

    def _lent_policy(self, target: PreTrainedModel, state: SpeculationState, rows: int, stack: ExitStack) -> Policy:
        """Load and check the request's policy. A policy given by name is reserved in a cache until `stack` closes."""
        policy, first = self.policy, self.sources[0] if self.sources else None
        if isinstance(policy, str):
            make = default_policy if policy == AUTO else partial(AutoPolicy.from_pretrained, policy)
            # keep costs apart that were measured while the compiler runs
            compiles = "beside" if self.compile == AUTO and state.compiler.is_running else self.compile
            key = PolicyCache.key(target, rows, policy, compiles, self.invariant)
            if len(self.sources) > 1:
                key = key, *map(ref, self.sources[1:])
            policy = stack.enter_context(state.policy_cache.borrow(first, key, make))
        check_policy(policy, has_head=first is not None, has_memory=bool(self.memories))
        if policy.has_identity:
            policy.check_identity(**pair_identity(target, first))
        return policy


def resolve(
    call: GenerateCall, own: GenerationConfig | None, attached: SpeculationDefaults, load: Callable[..., Any]
) -> Request:
    """Make a `Request`: each keyword is from the call, else its config, else the model's `own` config, else `attach`.

    `load` is `Assistants.load` of this target. Raises a `ValueError` if keywords have a wrong type, contradict each
    other, or would have no effect.
    """
    drafts_for_another = bool(getattr(call.config, "is_assistant", False))  # in Transformers' assisted decoding
    said, are_suspended = call.keywords, SpeculationDefaults.are_suspended() or drafts_for_another
    if not (are_suspended or said.has_stock_assistant):
        for further in (call.config, own, attached):
            if said.is_plain:  # ignores all later settings
                break
            said = said.or_else(further if isinstance(further, Keywords) else Keywords.saved_in(further))
    check_keywords(said)
    told: dict[str, Any] = {}
    if said.asks_trees and not said.assistants and setting_of(USE_MTP, call.arguments, (call.config, own)):
        said, told = replace(said, assistant_model=MTP), {USE_MTP: False}
    said = said.loaded(partial(load, as_source=said.asks_trees))
    memories = tuple(source for source in said.sources if isinstance(source, SuffixMemory))
    sources = tuple(source for source in said.sources if not isinstance(source, SuffixMemory))
    policy = said.policy
    if policy is None and said.sources:
        shape = (*sources, *memories)[0].default_shape
        looked_up = max((shape.lookup, *(memory.default_shape.lookup for memory in memories)))
        policy = FixedPolicy(replace(shape, lookup=looked_up))
    elif policy is None and said.invariant and said.assistant_model is None:
        policy = FixedPolicy(TreeShape.plain())
    eval_mode = attached.eval_mode and not (are_suspended or said.is_plain)
    if policy is None or said.is_plain:
        check_effect(call.keywords)  # not those of a config or `attach`: other calls may use them
        told = {} if said.assistant_model is None else {"assistant_model": said.assistant_model}
        return Request(eval_mode=eval_mode, is_plain_throughout=said.is_plain, told=told)
    name = os.fspath(policy) if isinstance(policy, str | os.PathLike) else policy
    return Request(
        name, sources, memories, said.lockstep, said.compile, bool(said.invariant), eval_mode=eval_mode, told=told
    )
