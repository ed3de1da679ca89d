"""`generate(..., assistant_model=head, policy=policy)` on any loaded model.

The mixin that `attach` puts in front of a model's class. Everything before the decoding loop stays Transformers' own,
and so does every call without a head.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, cast

from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

from ..compat import CACHE_KEYWORD
from ..decoding.batch import Batch
from ..decoding.loop import TreeDecoding
from ..drafting.engine import DraftEngines
from ..policies import AutoPolicy, Policy, PolicyCache
from ..policies.auto import default_policy
from ..telemetry.report import SpeculationReport
from ..verifying.cache import stop_recording
from ..verifying.slots import SlotEngine
from .checks import check_forward_arguments, check_lengths, check_synced, check_tree_attention
from .inputs import GenerateInputs, is_lockstep, lockstep_reason, tree_verifier
from .output import SpeculativeOutput
from .request import (
    Asked,
    CompileChoice,
    NamedHeads,
    Request,
    SpeculationDefaults,
    configured,
    draft_head,
    is_name,
    is_plain,
    is_stock_assistant,
    read_request,
)
from .request import AUTO_named as AUTO


_request: ContextVar[Request | None] = ContextVar("resps_request", default=None)


class ReSpSGenerationMixin(GenerationMixin):
    """`generate` with draft trees; put in front of a model's class by `attach`.

    Attributes:
        speculation_defaults: what `attach` was given.
        has_verified_trees: whether this model was seen to verify draft trees, or is of an architecture that does.
    """

    speculation_defaults = SpeculationDefaults()
    has_verified_trees = False

    @cached_property
    def policy_cache(self) -> PolicyCache:
        """What `policy="auto"`, and policies that calls named, have learned on this model."""
        return PolicyCache()

    @cached_property
    def named_heads(self) -> NamedHeads:
        """The heads that calls named by a folder or a Hub id."""
        return NamedHeads()

    @cached_property
    def slot_engine(self) -> SlotEngine:
        """The buffers and the compiled code of this model."""
        return SlotEngine()

    @cached_property
    def draft_engines(self) -> DraftEngines:
        """The captured or compiled drafts of the heads that this model used last."""
        return DraftEngines()

    def generate(  # type: ignore[override]  # stock generate is decorated; the parameters are its own, and `policy`
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        policy: Policy | str | None = None,
        lockstep: bool | None = None,
        compile: CompileChoice | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, and faster with a draft head or a policy.

        All parameters of the stock method hold. The next four default to what `attach` was given, `policy` and
        `lockstep` before that to what `generation_config` says. A folder or a Hub id is loaded once and kept as long
        as the model lives.

        - `assistant_model`: a `DraftHead`, or its folder or Hub id, drafts trees; any other assistant is Transformers'
          own assisted decoding.
        - `policy`: shapes the trees; an object, or the folder or Hub id of a saved one. `None` uses the head's default
          tree. "auto" weighs every node against its cost, drafts by lookup alone where there is no head, and keeps
          what it learned as long as model and head live. "plain" is stock decoding, whatever `attach` was given.
        - `lockstep`: whether the rows of a batch advance together, as far as the row that accepts least. By default
          sampled rows do, so that the same seed gives the same tokens, and greedy rows do not. `False` lets sampled
          rows advance each on its own: faster, with the distribution of plain decoding and other draws.
        - `compile`: whether the target's steps run compiled, on a CPU with the weights inside the code, on a GPU as
          CUDA graphs. `True` compiles at the first step, for a minute or more; "auto" does when eager steps have taken
          as long. What cannot be compiled runs as it is, with a warning. A `compile_config` means `True`.

        Returns:
            `[b, s + t]` token ids: those of the same call without head and policy, with the same seed. With
            `return_dict_in_generate=True` a `SpeculativeOutput`.

        Raises:
            ValueError: the head is another target's, or the call asks for what a tree cannot do.
        """
        given: dict[str, Any] = {"generation_config": generation_config, "logits_processor": logits_processor}
        given |= {"stopping_criteria": stopping_criteria, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn}
        given |= {"synced_gpus": synced_gpus, "streamer": streamer, "custom_generate": custom_generate}
        given |= {"negative_prompt_ids": negative_prompt_ids}
        given["negative_prompt_attention_mask"] = negative_prompt_attention_mask
        arguments = {name: value for name, value in given.items() if value is not None} | kwargs
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        asked = Asked(assistant_model, policy, lockstep, compile)
        with self._requested(asked, generation_config, arguments, prompts) as assistant:
            # by name, and only what was given: a model class may have a `generate` of its own
            return super().generate(*([] if inputs is None else [inputs]), **arguments, **assistant)

    @contextmanager
    def _requested(
        self,
        asked: Asked,
        config: GenerationConfig | None,
        arguments: dict[str, Any],
        prompts: Tensor | None,
    ) -> Iterator[dict[str, Any]]:
        """Hold what a call asks for while stock `generate` runs.

        Args:
            asked: the keywords that stock `generate` does not have, and its assistant.
            config: its `generation_config`.
            arguments: all its other keyword arguments.
            prompts: `[b, s]`.

        Yields:
            `assistant_model` for the stock call, or nothing.
        """
        target = cast(PreTrainedModel, self)
        with ExitStack() as stack:
            if not (SpeculationDefaults.are_suspended() or is_stock_assistant(asked.assistant_model)):
                policy, lockstep = configured(asked.policy, asked.lockstep, config, target.generation_config)
                asked = asked._replace(policy=policy, lockstep=lockstep)
            if is_plain(asked.assistant_model, asked.policy):
                stack.enter_context(SpeculationDefaults.suspended())  # calls within this one are plain, too
                asked = asked._replace(policy=None)
            defaults = self.speculation_defaults.in_force()
            asked = defaults.fill(asked)
            if is_name(asked.assistant_model):
                asked = asked._replace(assistant_model=self.named_heads.load(asked.assistant_model, target))
            head = draft_head(asked.assistant_model)
            if defaults.eval_mode:
                stack.enter_context(defaults.mode.held(target, head))

            def borrow(name: str) -> Policy:
                key = PolicyCache.key(target, 1 if prompts is None else len(prompts), name, asked.compile)
                load = partial(AutoPolicy.from_pretrained, name)
                make = partial(default_policy, target.device) if name == AUTO else load
                return stack.enter_context(self.policy_cache.borrow(head, key, make))

            request = read_request(target, asked, config, arguments, borrow)
            if request is not None and not self.has_verified_trees:
                check_tree_attention(target)
                self.has_verified_trees = True
            token = _request.set(request)
            try:
                assistant = head or asked.assistant_model
                yield {} if assistant is None else {"assistant_model": assistant}
            finally:
                _request.reset(token)

    def _validate_generation_mode(self, mode: Any, config: GenerationConfig, *args: Any) -> None:
        """Stock refuses every assistant of a recurrent target, whose states it cannot take back."""
        request, stock = _request.get(), cast(Any, super())
        is_ours = request is not None and request.bound is not None and config.num_return_sequences == 1
        if is_ours and stock._is_stateful:
            mode = GenerationMode.SAMPLE if config.do_sample else GenerationMode.GREEDY_SEARCH
        stock._validate_generation_mode(mode, config, *args)

    def _assisted_decoding(self, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        """Where stock `generate` goes when it is given an assistant.

        `inputs_tensor`, which the assistant of an encoder-decoder encodes, comes only to a method that names it.
        """
        request = _request.get()
        stock: Any = super()
        if request is None or request.bound is None or kwargs.get("assistant_model") is not request.bound.head:
            return stock._assisted_decoding(*args, inputs_tensor=inputs_tensor, **kwargs)
        return self._speculate(request, *args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Where stock `generate` goes without an assistant; a policy alone drafts by lookup."""
        request = _request.get()
        stock: Any = super()
        if request is None or request.bound is not None:
            return stock._sample(*args, **kwargs)
        return self._speculate(request, *args, **kwargs)

    def _speculate(
        self,
        request: Request,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        with ExitStack() as stack:
            if streamer is not None:
                stack.callback(streamer.end)  # whatever happens: a consumer may be waiting for it
            check_synced(model_kwargs.get("synced_gpus"))
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _NOT_OURS}
            check_forward_arguments(input_ids, model_kwargs)
            inputs = GenerateInputs(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
            self._fit_cache(inputs)
            stack.callback(stop_recording, inputs.cache)
            return self._answer(request, inputs)

    def _answer(self, request: Request, inputs: GenerateInputs) -> Any:
        batch = self._make_batch(request.lockstep, inputs)
        report = self._decode(request, batch, inputs)
        report.answers = batch.answers(inputs.input_ids.shape[1])
        if not inputs.config.return_dict_in_generate:
            return batch.input_ids
        kept: dict[str, Any] = {"sequences": batch.input_ids, "scores": batch.scores, "logits": batch.logits}
        kept[CACHE_KEYWORD] = inputs.cache if len(batch) == 1 or inputs.is_cache_given else None
        return SpeculativeOutput(**kept, speculation=report)

    def _fit_cache(self, inputs: GenerateInputs) -> None:
        """Check that cache and text fit; replace a static cache of `generate`, which cannot hold a tree."""
        target = cast(PreTrainedModel, self)
        if inputs.config.cache_implementation == "static":  # trees decode over slots, whatever reads the prompt
            inputs.model_kwargs[CACHE_KEYWORD] = DynamicCache(config=target.config.get_text_config(decoder=True))
        position_count = inputs.model_kwargs["position_ids"].shape[1]
        check_lengths(target, inputs.cache, inputs.input_ids.shape[1], position_count, inputs.max_length)

    def _make_batch(self, lockstep: bool | None, inputs: GenerateInputs) -> Batch:
        """Make one text of each row, a ragged batch, or one of all rows where they advance in lockstep."""
        if len(inputs.input_ids) == 1:
            return Batch([inputs.text(inputs.input_ids)], drops_finished=False)
        asked = {
            "`output_scores`": inputs.keeps_scores,
            "`output_logits`": inputs.keeps_logits,
            "a streamer": inputs.streamer is not None,
            "a cache of your own": inputs.is_cache_given,
        }
        target = cast(PreTrainedModel, self)
        reason = lockstep_reason(target, inputs.logits_processor, inputs.stopping_criteria, asked)
        if is_lockstep(lockstep, inputs.config.do_sample, reason):
            return Batch([inputs.text(inputs.input_ids)], drops_finished=reason is None)
        return Batch([inputs.text(row) for row in inputs.input_ids.split(1)], drops_finished=True)

    def _decode(self, request: Request, batch: Batch, inputs: GenerateInputs) -> SpeculationReport:
        """Prefill, then one step after another until all texts are finished."""
        target, model_kwargs = cast(PreTrainedModel, self), inputs.model_kwargs
        mask = model_kwargs["attention_mask"]
        layers = None if request.bound is None else request.bound.head.config.feature_layers or []
        with (
            tree_verifier(target, self.slot_engine, layers, request.compile, inputs) as verifier,
            self.draft_engines.borrow(request.bound if verifier.is_compiled else None) as draft_engine,
        ):
            limits = {"attention_mask": mask, "max_length": inputs.max_length}
            decoding = TreeDecoding(
                verifier, request.bound, request.policy, batch, **limits, draft_engine=draft_engine
            )
            decoding.prefill(
                inputs.config.prefill_chunk_size,
                {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs},
            )
            with cast(Any, target)._optimize_model_for_decode():
                while not batch.finished:
                    decoding.step()
        self.slot_engine.note(decoding.report.seconds)
        return decoding.report


# What stock decoding methods are told and a tree has no use for.
_NOT_OURS = ("synced_gpus", "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")
