"""What one call of `generate` asks for, read and checked before any work."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

from transformers import GenerationConfig, PreTrainedModel

from ..heads import BoundHead, DraftHead, pair_identity
from ..policies.auto import PolicyCache, default_policy
from ..policies.base import Policy
from ..policies.fixed import FixedPolicy
from ..policies.saving import AutoPolicy
from .checks import check_draws, check_model, check_settings, check_tree_attention
from .state import AUTO, CompileChoice, Keywords, SpeculationDefaults, SpeculationState, is_name


class Call(NamedTuple):
    """One call of `generate`, as its caller wrote it.

    Attributes:
        keywords: ours, and the assistant.
        config: its `generation_config`.
        arguments: all its other keyword arguments.
        rows: of its prompts.
    """

    keywords: Keywords
    config: GenerationConfig | None
    arguments: Mapping[str, Any]
    rows: int

    def configured(self, own: GenerationConfig | None) -> Keywords:
        """The keywords, where they say nothing those of the call's config, and then those of the model's `own`."""
        keywords = self.keywords
        if SpeculationDefaults.are_suspended() or keywords.has_stock_assistant:
            return keywords
        for config in (self.config, own):
            if keywords.is_plain:  # whatever the next config says
                break
            keywords = keywords.or_else(Keywords(policy=_saved(config, "policy"), lockstep=_saved(config, "lockstep")))
        return keywords


@dataclass(frozen=True, slots=True)
class Request:
    """What one call asks for; stock's own preparation stands between reading it and decoding.

    Attributes:
        assistant_model: for stock `generate`: the head, an assistant of Transformers' own, or `None`.
        policy: decides; `None` for a stock call.
        bound: the head that drafts; `None` to draft by lookup alone.
        lockstep: whether the rows of a batch advance together; `None` when the caller leaves it to us.
        compile: whether the target's steps run compiled; `None` likewise.
    """

    assistant_model: Any
    policy: Policy | None = None
    bound: BoundHead | None = None
    lockstep: bool | None = None
    compile: CompileChoice | None = None

    @classmethod
    @contextmanager
    def read(cls, model: PreTrainedModel, state: SpeculationState, call: Call) -> Iterator["Request"]:
        """Read what a call asks for and check it; what it borrows is given back at the end of the `with` block.

        Raises:
            ValueError: it asks for what a tree cannot do.
        """
        with ExitStack() as stack:
            keywords = call.configured(model.generation_config)
            keywords.check()
            if keywords.is_plain:
                stack.enter_context(SpeculationDefaults.suspended())  # calls within this one are plain, too
                keywords = replace(keywords, policy=None)
            defaults = state.defaults.in_force()
            keywords = defaults.fill(keywords)
            if is_name(keywords.assistant_model):
                head = state.named_heads.load(keywords.assistant_model, model)
                keywords = replace(keywords, assistant_model=head)
            if defaults.eval_mode:
                stack.enter_context(state.evaluation_mode.held(model, keywords.head))
            if keywords.head is None and keywords.policy is None:
                _check_stock(keywords)
                yield cls(keywords.assistant_model)
                return
            yield cls._speculative(model, state, call, keywords, stack)

    @classmethod
    def _speculative(
        cls, model: PreTrainedModel, state: SpeculationState, call: Call, keywords: Keywords, stack: ExitStack
    ) -> "Request":
        head, policy = keywords.head, keywords.policy
        if keywords.has_stock_assistant:
            raise ValueError(
                f"Got policy={policy!r} with assistant_model={type(keywords.assistant_model).__name__}, but a policy "
                "shapes the trees of a draft head. Pass `assistant_model=DraftHead.from_pretrained(...)`, or leave "
                "out `policy`."
            )
        check_model(model)
        check_settings(model, call.config, call.arguments)
        bound = None if head is None else BoundHead(head, model)
        if head is not None:
            check_draws(head)
        if policy is None:
            policy = FixedPolicy(cast(DraftHead, head).default_shape)
        elif not isinstance(policy, Policy):
            name = os.fspath(policy)
            make = partial(default_policy, model.device) if name == AUTO else partial(AutoPolicy.from_pretrained, name)
            key = PolicyCache.key(model, call.rows, name, keywords.compile)
            policy = stack.enter_context(state.policy_cache.borrow(head, key, make))
        if head is None and policy.needs_head:
            raise ValueError(
                f"policy={policy!r} shapes the trees of a draft head, and the call has none. Pass "
                "`assistant_model=DraftHead.from_pretrained(...)`, or `policy='auto'` to draft by lookup alone."
            )
        if policy.has_identity:
            policy.check_identity(**pair_identity(model, head))
        if not state.has_verified_trees:
            check_tree_attention(model)
            state.has_verified_trees = True
        return cls(head, policy, bound, keywords.lockstep, keywords.compile)


def _saved(config: GenerationConfig | None, name: str) -> Any:
    """What a `generation_config.json` says of a keyword; Transformers itself refuses an `assistant_model` there."""
    kind = {"policy": str, "lockstep": bool}[name]
    value = getattr(config, name, None)
    if not isinstance(value, kind | None):
        raise ValueError(
            f"`generation_config.{name}` is saved as JSON, so it must be a {kind.__name__}, got a "
            f"{type(value).__name__}. Pass the object to `generate` or `attach` instead."
        )
    return value


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
