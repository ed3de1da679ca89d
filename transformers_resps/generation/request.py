"""What one call of `generate` asks for, and what its model keeps from call to call.

In reading order: the keywords, the defaults that `attach` was given, the state of a model, a call, and what it is
resolved to: a request, which is checked before any work.
"""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

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
from .checks import PROMPT_ARGUMENTS, check_draws, check_inputs, check_model, check_settings, setting_of


AUTO: Literal["auto"] = "auto"  # as `policy` our default one, which learns while it decodes
PLAIN: Literal["plain"] = "plain"  # stock decoding, whatever `attach` was given
MTP: Literal["mtp"] = "mtp"  # as `assistant_model` the layers that came with the target
USE_MTP = "use_mtp"  # Transformers' keyword for them: with a policy they draft trees
# The keywords that a `generation_config` may hold, as JSON of these types.
CONFIG_KEYWORDS: dict[str, type] = {"policy": str, "lockstep": bool, "invariant": bool}
# True compiles at the first step, "auto" in another process on a CPU
CompileChoice = bool | Literal["auto"]


def is_name(value: Any) -> bool:
    """Whether a keyword of `generate` is a folder or a Hub id, and no word such as "auto"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO, PLAIN)


@dataclass(frozen=True, slots=True)
class Keywords:
    """The keywords of `generate` that speculation adds, and its assistant; `None` where nothing is said.

    Attributes:
        assistant_model: a source, its folder or Hub id, an assistant of Transformers' own, or several sources.
        policy: a policy, its folder or Hub id, "auto" or "plain".
        lockstep: whether the rows of a batch advance together.
        compile: whether the target's steps run compiled.
        invariant: whether the text is to be the same in any dtype, whatever drafts.
    """

    assistant_model: Any = None
    policy: Any = None
    lockstep: bool | None = None
    compile: CompileChoice | None = None
    invariant: bool | None = None

    @staticmethod
    def saved_in(config: GenerationConfig | None) -> "Keywords":
        """What a `generation_config.json` says; Transformers itself refuses an `assistant_model` there."""
        said = {name: getattr(config, name, None) for name in CONFIG_KEYWORDS}
        for name, kind in CONFIG_KEYWORDS.items():
            if not isinstance(said[name], kind | None):
                raise ValueError(
                    f"`generation_config.{name}` is saved as JSON, so it must be a {kind.__name__}, got a "
                    f"{type(said[name]).__name__}. Pass the object to `generate` or `attach` instead."
                )
        return Keywords(**said)

    @property
    def assistants(self) -> list[Any]:
        """One, several, or none."""
        given = self.assistant_model
        return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]

    @property
    def sources(self) -> list[DraftSource]:
        """What drafts trees, also from inside PEFT wrappers: no names, and no other assistants."""
        return [inner for inner in map(unwrapped, self.assistants) if isinstance(inner, DraftSource)]

    @property
    def has_stock_assistant(self) -> bool:
        """Whether the call drafts in Transformers' own way: with a policy, a small model drafts trees."""
        is_model = isinstance(self.assistant_model, Module) and not self.sources
        return is_model and (self.policy is None or self.is_plain)

    @property
    def asks_trees(self) -> bool:
        """Whether models of Transformers are to draft trees, too: with a policy, or beside other assistants. Its
        candidate generators always are, since stock takes none.
        """
        asks = self.policy is not None or isinstance(self.assistant_model, list | tuple | CandidateGenerator)
        return asks and not self.is_plain

    def loaded(self, load: Callable[[Any], Any]) -> Self:
        """The same with every assistant as `load` returns it."""
        given = self.assistant_model
        if isinstance(given, list | tuple):
            return replace(self, assistant_model=[load(one) for one in given])
        return self if given is None else replace(self, assistant_model=load(given))

    @property
    def is_plain(self) -> bool:
        """Whether stock decoding is asked for by name."""
        return isinstance(self.policy, str) and self.policy == PLAIN

    def or_else(self, other: "Keywords") -> Self:
        """These keywords, each replaced by the other's where it says nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(Keywords)}
        return replace(self, **{name: getattr(other, name) for name, value in said.items() if value is None})

    def check(self) -> None:
        """Refuse keywords of the wrong kind, before any work.

        Raises:
            ValueError: names the keyword and what it takes.
        """
        if isinstance(self.assistant_model, list | tuple) and not self.assistants:
            raise ValueError("`assistant_model` is an empty list. Leave it out to draft by lookup alone.")
        for given in self.assistants:
            if not (is_name(given) or isinstance(given, Module | DraftSource | CandidateGenerator)):
                raise ValueError(
                    f"`assistant_model` must be a folder, a Hub id, or a loaded model or head, got {given!r}. "
                    f"{_instead_of_assistant(given)}"
                )
        for name in ("lockstep", "invariant"):
            value = getattr(self, name)
            if not isinstance(value, bool | None):
                raise ValueError(f"`{name}` must be True, False or None, got {value!r}.")
        if self.compile is not None and not isinstance(self.compile, bool) and self.compile != AUTO:
            raise ValueError(f"`compile` must be True, False, 'auto' or None, got {self.compile!r}.")
        if self.is_plain and self.assistant_model is not None and not self.has_stock_assistant:
            raise ValueError("`policy='plain'` decodes without a draft head. Leave out one of the two.")
        if self.is_plain and self.invariant:
            raise ValueError(
                "`policy='plain'` with `invariant=True` is a contradiction, since stock decoding rounds otherwise. "
                "Leave out the policy for invariant plain decoding."
            )
        self._check_policy()

    def _check_policy(self) -> None:
        policy = self.policy
        if policy is None or isinstance(policy, Policy) or (isinstance(policy, str) and policy in (AUTO, PLAIN)):
            return
        if is_name(policy) and ("/" in os.fspath(policy) or Path(policy).is_dir()):
            return
        got = f"a {type(policy).__name__}" if isinstance(policy, Module) else repr(policy)  # a head prints its layers
        raise ValueError(
            "`policy` must be 'auto', 'plain', a folder, a Hub id (`owner/name`) or an object of a subclass of "
            f"`Policy`, got {got}. {_instead_of_policy(policy)}"
        )


def _instead_of_assistant(given: Any) -> str:
    """What to pass for something that was given as `assistant_model` and is none."""
    if isinstance(given, str | Policy):  # "auto" or "plain"
        return "Pass it as `policy`, which needs no assistant to draft by lookup."
    if isinstance(given, TreeShape):
        return f"Pass a head, and `policy=FixedPolicy({given!r})`."
    return "Pass `DraftHead.from_pretrained(...)`."


def _instead_of_policy(given: Any) -> str:
    """What to pass for something that was given as `policy` and is none."""
    if isinstance(given, TreeShape):
        return f"Pass `FixedPolicy({given!r})`."
    if isinstance(given, Module):
        return "Pass it as `assistant_model`."
    if is_name(given):  # such as a mistyped "auto"
        return "Check the word, or the path."
    return "Subclass `transformers_resps.Policy`, write `choose`, and pass an object, not the class."


_are_suspended: ContextVar[bool] = ContextVar("resps_defaults_are_suspended", default=False)


@dataclass(frozen=True, slots=True)
class SpeculationDefaults(Keywords):
    """What `attach` was given: keywords for every call that leaves them out, such as those of TRL's trainers.

    Attributes:
        eval_mode: every call runs in evaluation mode, also while the model trains.
    """

    eval_mode: bool = False

    def check(self) -> None:
        """As `Keywords.check`; and "plain" is no default."""
        if self.is_plain:
            raise ValueError("`policy='plain'` is no default: an attached model without defaults decodes plainly.")
        if not isinstance(self.eval_mode, bool):
            raise ValueError(f"`eval_mode` must be True or False, got {self.eval_mode!r}.")
        Keywords.check(self)

    @staticmethod
    @contextmanager
    def suspended() -> Iterator[None]:
        """Ignore all models' defaults inside the `with` block, in this thread: calls without keywords are plain."""
        token = _are_suspended.set(True)
        try:
            yield
        finally:
            _are_suspended.reset(token)

    @staticmethod
    def are_suspended() -> bool:
        """Whether they are ignored in this thread now."""
        return _are_suspended.get()


class Assistants:
    """What drafts for one target: each name loaded once, and a source for each model, as long as the model lives."""

    def __init__(self) -> None:
        self._named: dict[Hashable, DraftSource | PreTrainedModel] = {}
        self._sources: WeakKeyDictionary[Any, DraftSource] = WeakKeyDictionary()

    def load(self, target: PreTrainedModel, assistant: Any, *, as_source: bool) -> Any:
        """An assistant that a call named or holds; a model of Transformers stays what it is, or drafts trees.

        Raises:
            ValueError, OSError: it is not there, or cannot draft for this target.
        """
        if is_name(assistant):
            key = os.fspath(assistant), target.device, target.dtype
            if key not in self._named:
                self._named[key] = load_drafter(assistant, target)
            assistant = self._named[key]
        model = unwrapped(assistant)
        if not as_source or isinstance(model, DraftSource):
            return assistant
        if not isinstance(model, PreTrainedModel | CandidateGenerator):
            raise ValueError(
                f"Got a policy with assistant_model={type(model).__name__}, but a policy shapes the trees of a draft "
                "head or of a causal model. Pass `assistant_model=DraftHead.from_pretrained(...)`, a model of "
                "`AutoModelForCausalLM`, or leave out `policy`."
            )
        if model not in self._sources:
            self._sources[model] = source_of(model, target)
        return self._sources[model]

    def source(self, target: PreTrainedModel, head: Any) -> DraftSource | None:
        """What drafts trees, of what a tool was given as `head`: a source, a model, or the name of either; `None` for
        none.

        Raises:
            ValueError, OSError: it is nothing of that, is not there, or cannot draft for this target.
        """
        if head is None:
            return None
        if not (is_name(head) or isinstance(unwrapped(head), DraftSource | PreTrainedModel)):
            got = f"a {type(head).__name__}" if isinstance(head, Module) else repr(head)
            raise ValueError(
                f"`head` must be what drafts: a loaded draft head, another source or model, or a name, got {got}. "
                f"{_instead_of_assistant(head)}"
            )
        return unwrapped(self.load(target, head, as_source=True))


class SpeculationState:
    """All that a model keeps for speculation. `attach` gives it, `detach` takes it away whole.

    A copied or pickled model keeps its defaults, and starts anew with everything else.

    Attributes:
        defaults: what `attach` was given.
        policy_cache: what "auto", and policies that calls named, have learned on this model.
        assistants: the sources that calls named or made of models.
        slot_engine: the buffers and the compiled code of this model.
        draft_engines: the captured or compiled drafts of its heads, each as long as the head lives.
        invariant_calls: what calls with `invariant=True` share.
        pace: what steps of this model take at their best.
        compiler: what compiles beside calls with `compile="auto"`.
    """

    def __init__(self, defaults: SpeculationDefaults | None = None) -> None:
        self.defaults = defaults or SpeculationDefaults()
        self.policy_cache = PolicyCache()
        self.assistants = Assistants()
        self.slot_engine = SlotEngine()
        self.draft_engines = DraftEngines()
        self.invariant_calls = InvariantCalls(self.slot_engine)
        self.pace = Pace()
        self.compiler = CompilerProcess()
        self._verified_trees = set[bool]()  # with FlashAttention and without

    def check_trees(self, model: PreTrainedModel, make_forward: Callable[[], TargetForward]) -> None:
        """Check, once, that the model can verify a draft tree; see `check_tree_attention`."""
        reads_by_flash = is_flash(model.config.get_text_config()._attn_implementation)
        if reads_by_flash not in self._verified_trees:
            check_tree_attention(make_forward)
            self._verified_trees.add(reads_by_flash)

    def __reduce__(self) -> tuple[type["SpeculationState"], tuple[SpeculationDefaults]]:
        return SpeculationState, (self.defaults,)


class Call(NamedTuple):
    """One call of `generate`, as its caller wrote it.

    Attributes:
        keywords: ours, and the assistant.
        config: its `generation_config`.
        arguments: all its other keyword arguments.
        prompts: `[b, s]`; `None` where it has embeddings only.
    """

    keywords: Keywords
    config: GenerationConfig | None
    arguments: Mapping[str, Any]
    prompts: Tensor | None

    @property
    def rows(self) -> int:
        """Of its prompts."""
        given = (value for value in (self.prompts, *self.arguments.values()) if isinstance(value, Tensor))
        return next(map(len, given), 1)

    @property
    def media(self) -> list[str]:
        """Names of arguments that belong to images, sounds or embeddings of its prompts."""
        return sorted(name for name in PROMPT_ARGUMENTS & self.arguments.keys() if self.arguments[name] is not None)

    @property
    def drafts_for_another(self) -> bool:
        """Whether stock's assisted decoding makes the call, of its assistant: one for each round of a text."""
        return bool(getattr(self.config, "is_assistant", False))

    def asks_mtp(self, own: GenerationConfig | None) -> bool:
        """Whether the call, its config or the model's `own` asks for the layers that came with the target."""
        configs = [config for config in (self.config, own) if config is not None]
        saved = next((getattr(config, USE_MTP, None) for config in configs), None)
        return bool(self.arguments.get(USE_MTP, saved))


@dataclass(frozen=True, slots=True)
class Request:
    """What one call asks for; stock's own preparation stands between `resolve` and decoding.

    Attributes:
        policy: decides; the name of one until the request is `admitted`, and "plain" where stock decodes.
        sources: what drafts; empty to draft by lookup alone.
        memories: are looked up beside the text, the nearest first.
        lockstep: whether the rows of a batch advance together; `None` when the caller leaves it to us.
        compile: whether the target's steps run compiled; `None` likewise.
        invariant: whether the text is to be the same in any dtype, whatever drafts.
        eval_mode: whether the call runs in evaluation mode.
        is_plain_throughout: whether calls within this one are plain, too.
        told: keyword arguments of stock `generate` that say the same.
    """

    policy: Policy | str = PLAIN
    sources: tuple[DraftSource, ...] = ()
    memories: tuple[SuffixMemory, ...] = ()
    lockstep: bool | None = None
    compile: CompileChoice | None = None
    invariant: bool = False
    eval_mode: bool = False
    is_plain_throughout: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether stock decodes, plainly or with an assistant of its own."""
        return self.policy == PLAIN

    @contextmanager
    def admitted(self, target: PreTrainedModel, state: SpeculationState, call: Call) -> Iterator["Request"]:
        """The request, checked, with its policy; what it borrows is given back at the end of the `with` block.

        Raises:
            ValueError: it asks for what a tree cannot do.
        """
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
            check_settings(target, call.config, call.arguments)
            check_inputs(target, call.prompts, call.arguments)
            if self.invariant:
                setting = partial(setting_of, model=target, config=call.config, arguments=call.arguments)
                given = call.arguments, call.media, self.compile
                state.invariant_calls.admit(target, setting, *given)
            for module in modules:
                check_draws(module)
            for source in (*self.sources, *self.memories):
                source.prepare(target)
            policy = self._lent_policy(target, state, call.rows, stack)
            if not target.config.is_encoder_decoder:  # whose source is not encoded yet
                state.check_trees(target, partial(TargetForward.of, target))
            yield replace(self, policy=policy)

    def _lent_policy(self, target: PreTrainedModel, state: SpeculationState, rows: int, stack: ExitStack) -> Policy:
        """The policy, which `stack` gives back if it was named, and which fits the pair."""
        policy, first = self.policy, self.sources[0] if self.sources else None
        if isinstance(policy, str):
            make = default_policy if policy == AUTO else partial(AutoPolicy.from_pretrained, policy)
            # what was learned of costs beside the compiler is never asked again
            compiles = "beside" if self.compile == AUTO and state.compiler.is_running else self.compile
            key = PolicyCache.key(target, rows, policy, compiles, self.invariant)
            if len(self.sources) > 1:
                key = key, *map(ref, self.sources[1:])
            policy = stack.enter_context(state.policy_cache.borrow(first, key, make))
        if first is None and policy.needs_head:
            raise ValueError(
                f"policy={policy!r} shapes the trees of a draft head, and the call has none. Pass "
                "`assistant_model=DraftHead.from_pretrained(...)`, or `policy='auto'` to draft by lookup alone."
            )
        if self.memories and not policy.uses_lookup:
            raise ValueError(
                f"policy={policy!r} asks for no looked-up nodes, and the call has a memory. Pass a shape with "
                "`lookup=8`, `policy='auto'`, or no policy."
            )
        if policy.has_identity:
            policy.check_identity(**pair_identity(target, first))
        return policy


def resolve(
    call: Call, own: GenerationConfig | None, attached: SpeculationDefaults, load: Callable[..., Any]
) -> Request:
    """What a call asks for: first its keywords say, then its config, the model's own, and what `attach` was given.

    `load` is the model's `Assistants.load`. Raises a `ValueError` for keywords of the wrong kind, that contradict each
    other, or that would have no effect.
    """
    said, are_suspended = call.keywords, SpeculationDefaults.are_suspended() or call.drafts_for_another
    if not (are_suspended or said.has_stock_assistant):
        for further in (call.config, own, attached):
            if said.is_plain:  # whatever the next one says
                break
            said = said.or_else(further if isinstance(further, Keywords) else Keywords.saved_in(further))
    said.check()
    told: dict[str, Any] = {}
    if said.asks_trees and not said.assistants and call.asks_mtp(own):
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
        _check_stock(call.keywords)  # what a config or `attach` says waits for a call that speculates
        told = {} if said.assistant_model is None else {"assistant_model": said.assistant_model}
        return Request(eval_mode=eval_mode, is_plain_throughout=said.is_plain, told=told)
    name = os.fspath(policy) if isinstance(policy, str | os.PathLike) else policy
    return Request(
        name, sources, memories, said.lockstep, said.compile, bool(said.invariant), eval_mode=eval_mode, told=told
    )


def _check_stock(keywords: Keywords) -> None:
    """Refuse keywords that would have no effect."""
    if keywords.lockstep is not None:
        raise ValueError(
            f"Got lockstep={keywords.lockstep!r} without a draft head or a policy, but only draft trees make a batch "
            "ragged. Leave out `lockstep`."
        )
    if keywords.compile:
        raise ValueError(
            f"Got compile={keywords.compile!r} without a draft head or a policy, but only our own steps are compiled. "
            "Pass `policy='auto'`, or `policy=FixedPolicy(TreeShape.plain())` for compiled plain decoding."
        )
    if keywords.invariant:
        raise ValueError(
            "Got invariant=True with an assistant of Transformers' own, whose text depends on what it drafts. Pass "
            "`policy='auto'` as well, so that it drafts trees."
        )
