"""`generate(..., assistant_model=head, policy=policy)` on any loaded model.

`attach` gives a model object a subclass of its own class in which `generate` knows draft heads. Everything before
the decoding loop stays Transformers' own, and so does every call without a head.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .acceptance import Text
from .decoding import TreeDecoding
from .features import FeatureTap
from .head import BoundHead, DraftHead
from .policy import FixedPolicy, Policy, default_policy
from .probe import check_tree_attention
from .refusals import check_forward_arguments, check_model, check_settings
from .telemetry import SpeculationReport
from .versions import CACHE_KEYWORD


Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with a draft head and `return_dict_in_generate=True`.

    Attributes:
        speculation: every step's shape, tokens and seconds.
    """

    speculation: SpeculationReport | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """What one call of `generate` asked for; it cannot travel through Transformers' own preparation."""

    head: BoundHead | None
    policy: Policy


_request: ContextVar[_Request | None] = ContextVar("resps_request", default=None)


class ReSpSGenerationMixin(GenerationMixin):
    """`generate` with draft trees; put in front of a model's class by `attach`."""

    def generate(  # type: ignore[override]  # stock generate is decorated; the parameters are its own, and `policy`
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        *args: Any,
        policy: Policy | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, whose parameters all hold, and with a draft head or a policy faster.

        With a `DraftHead` as `assistant_model` draft trees are decoded; anything else there is Transformers' own
        assisted decoding. `policy` shapes the trees: the head's default tree when `None`, our best default when
        "auto", which without a head drafts by lookup alone.

        Returns:
            The tokens that the same call without `assistant_model` and `policy` returns with the same seed; with
            `return_dict_in_generate=True` a `SpeculativeOutput`.

        Raises:
            ValueError: the head is another target's, or the call asks for what a tree cannot do.
        """
        head = _draft_head(assistant_model)
        request = None
        if head is not None or policy is not None:
            _check_assistant(head, assistant_model, policy)
            arguments = {**kwargs, "synced_gpus": synced_gpus, **dict(zip(_AFTER_ASSISTANT, args, strict=False))}
            request = _make_request(cast(PreTrainedModel, self), head, policy, generation_config, arguments)
        token = _request.set(request)
        try:
            return super().generate(
                inputs,
                generation_config,
                logits_processor,
                stopping_criteria,
                prefix_allowed_tokens_fn,
                synced_gpus,
                head or assistant_model,
                *args,
                **kwargs,
            )
        finally:
            _request.reset(token)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Where stock `generate` goes when it is given an assistant."""
        request = _request.get()
        stock: Any = super()
        if request is None or request.head is None or kwargs.get("assistant_model") is not request.head.head:
            return stock._assisted_decoding(*args, **kwargs)
        return self._speculate(request, *args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Where stock `generate` goes without an assistant; a policy alone drafts by lookup."""
        request = _request.get()
        stock: Any = super()
        if request is None or request.head is not None:
            return stock._sample(*args, **kwargs)
        return self._speculate(request, *args, **kwargs)

    def _speculate(
        self,
        request: _Request,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        for name in _NOT_OURS:
            model_kwargs.pop(name, None)
        check_forward_arguments(model_kwargs)
        text = Text(
            input_ids,
            logits_processor,
            stopping_criteria,
            do_sample=generation_config.do_sample,
            pad_token=generation_config._pad_token_tensor,
            streamer=streamer,
            keep_scores=generation_config.return_dict_in_generate and generation_config.output_scores,
            keep_logits=generation_config.return_dict_in_generate and generation_config.output_logits,
        )
        try:
            report = self._decode(request, text, generation_config, model_kwargs)
            report.answers = text.input_ids[:, input_ids.shape[1] :].tolist()
        finally:
            if streamer is not None:
                streamer.end()
        if not generation_config.return_dict_in_generate:
            return text.input_ids
        kept: dict[str, Any] = {"sequences": text.input_ids, "scores": text.scores, "logits": text.logits}
        return SpeculativeOutput(**kept, speculation=report, **{CACHE_KEYWORD: model_kwargs[CACHE_KEYWORD]})

    def _decode(
        self, request: _Request, text: Text, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> SpeculationReport:
        """Prefill, then one step after another until the text is finished."""
        target = cast(PreTrainedModel, self)
        with ExitStack() as stack:
            tap = None
            if request.head is not None:
                tap = stack.enter_context(FeatureTap(target, request.head.head.config.feature_layers or []))
            decoding = TreeDecoding(
                target,
                request.head,
                request.policy,
                text,
                cache=model_kwargs[CACHE_KEYWORD],
                attention_mask=model_kwargs["attention_mask"],
                position_ids=model_kwargs["position_ids"],
                tap=tap,
                max_length=generation_config.max_length,
            )
            decoding.prefill(
                generation_config.prefill_chunk_size,
                {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs},
            )
            with cast(Any, target)._optimize_model_for_decode():
                while not text.finished:
                    decoding.step()
        return decoding.report

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the model's own class: the subclass exists in memory only."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        if arguments and arguments[0] is type(self):
            return (_new_attached, (type(self).__mro__[2], *arguments[1:]), *state)
        return (function, arguments, *state)


# What stock decoding methods are told and a tree has no use for.
_NOT_OURS = ("synced_gpus", "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")
# The parameters of stock `generate` behind `assistant_model`, in order.
_AFTER_ASSISTANT = ("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate")


def _draft_head(assistant_model: Any) -> DraftHead | None:
    """The head itself, also from inside a PEFT wrapper; `None` for any other assistant."""
    inner = assistant_model.get_base_model() if hasattr(assistant_model, "get_base_model") else assistant_model
    return inner if isinstance(inner, DraftHead) else None


def _check_assistant(head: DraftHead | None, assistant_model: Any, policy: Any) -> None:
    """A policy rules draft trees: refuse to combine it with an assistant of Transformers' own."""
    if head is None and assistant_model is not None:
        raise ValueError(
            f"Got policy={policy!r} with assistant_model={type(assistant_model).__name__}, but a policy shapes the "
            "trees of a draft head. Pass `assistant_model=DraftHead.from_pretrained(...)`, or leave out `policy`."
        )


def _make_request(
    target: PreTrainedModel,
    head: DraftHead | None,
    policy: Any,
    config: GenerationConfig | None,
    arguments: dict[str, Any],
) -> _Request:
    """Everything that can be refused is refused here, before any work."""
    policy = _resolve_policy(policy, head)
    check_model(target)
    check_settings(target, config, arguments)
    bound = None if head is None else BoundHead(head, target)
    check_tree_attention(target)
    return _Request(bound, policy)


def _resolve_policy(policy: Any, head: DraftHead | None) -> Policy:
    if policy is None and head is not None:
        return FixedPolicy(head.default_shape)
    if policy == "auto":
        return default_policy()
    if not isinstance(policy, Policy):
        raise ValueError(
            f"Got policy={policy!r}, but a policy is 'auto' or has the methods `choose`, `grow`, `size` and "
            "`observe`. Subclass `transformers_resps.Policy`, which has a default for all but the first."
        )
    if head is None and getattr(policy, "needs_head", True):
        raise ValueError(
            f"Got policy={policy!r} without a draft head, but it shapes the trees of one. Pass "
            "`assistant_model=DraftHead.from_pretrained(...)`, or `policy='auto'` to draft by lookup alone."
        )
    return policy


@functools.cache
def _attached_class(base: type) -> type:
    """`base` with the mixin in front; name and module stay, so that saving and output capturing see no difference."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ReSpSGenerationMixin, base), names)


def _new_attached(base: type, *arguments: Any) -> Any:
    cls = _attached_class(base)
    return cls.__new__(cls, *arguments)


def _inner(model: Any) -> Any:
    """The model that `generate` runs on: a PEFT wrapper forwards to the one it wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(model: Model) -> Model:
    """Let `model.generate` take draft heads and policies. Same object, same weights.

    Args:
        model: any decoder-only model of Transformers, or a PEFT model around one.

    Raises:
        ValueError: the model cannot generate.
    """
    inner = _inner(model)
    if not isinstance(inner, GenerationMixin):
        raise ValueError(
            f"Got a {type(inner).__name__}, but only models with `generate` can be attached. Load it with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )
    if not isinstance(inner, ReSpSGenerationMixin):
        base: Any = type(inner)
        inner.__class__ = _attached_class(base)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the same object, of its own class again."""
    inner = _inner(model)
    if isinstance(inner, ReSpSGenerationMixin):
        inner.__class__ = type(inner).__mro__[2]
    return model
