"""The mixin that `attach` puts in front of a model's class: `generate(..., assistant_model=head, policy=policy)`.

Everything before the decoding loop stays stock, and so does every call without a head and a policy.
"""

import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, cast

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ..drafting import DraftSource
from ..policies.base import Policy
from .checks import check_prompts
from .decode import decode
from .keywords import CONFIG_KEYWORDS, CompileChoice, Keywords
from .output import output
from .plan import plan, prepare
from .request import GenerateCall, Request, SpeculationState, resolve


_STOCK = Request()
# The call that runs now: stock's preparation runs between `generate` and `_sample`.
_request: ContextVar[Request] = ContextVar("resps_request", default=_STOCK)


class ReSpSGenerationMixin(GenerationMixin):
    """`generate` with draft trees; put in front of a model's class by `attach`."""

    @cached_property
    def speculation_state(self) -> SpeculationState:
        """The state that this model keeps from call to call."""
        return SpeculationState()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, so that our settings of the `generation_config` are loaded again.

        Transformers 5.24 drops unknown settings when it loads a config marked as a copy of the model's.
        """
        config = self.generation_config
        if config is not None and not vars(config).keys().isdisjoint(CONFIG_KEYWORDS):
            config._from_model_config = False
        cast(Any, super()).save_pretrained(*args, **kwargs)

    def generate(  # type: ignore[override]  # stock generate is decorated; the parameters are its own, and `policy`
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: DraftSource | PreTrainedModel | str | os.PathLike[str] | Sequence[Any] | None = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        policy: Policy | str | os.PathLike[str] | None = None,
        lockstep: bool | None = None,
        compile: CompileChoice | None = None,
        invariant: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, and faster with a draft head or a policy.

        All parameters of the stock method work. `None` takes the value of the `generation_config` (`policy`,
        `lockstep` and `invariant` only), then that of `attach`. Folders and Hub ids are loaded once and kept with the
        model.

        - `assistant_model`: drafts trees. A `DraftHead` or another source, its folder or Hub id; "mtp", or
          `use_mtp=True` with a policy, for the layers that came with the model; with a policy also a small causal
          model or an assistant of Gemma 4. The sources of a list draft one tree together. A `SuffixMemory` is looked
          up beside the text; the first of a list remembers what the call writes. Without a policy any other assistant
          runs Transformers' assisted decoding.
        - `policy`: shapes the trees; an object, or the folder or Hub id of a saved one. `None` uses the head's default
          tree. "auto" weighs every node against its cost, drafts by lookup alone without a head, and keeps what it
          learned while model and head live. "plain" is stock decoding, whatever `attach` was given.
        - `lockstep`: whether the rows of a batch advance together, as far as the row that accepts least. By default
          sampled rows do, so that a seed gives the tokens of plain decoding, and greedy rows do not. `False` lets
          sampled rows advance independently: faster, with the same distribution and other draws.
        - `compile`: whether the target's steps run compiled: on a CPU with prompts, and with the weights inside the
          code; on a GPU as CUDA graphs. `True` compiles at first use, for a minute or more. With "auto" on a CPU
          another process compiles, and calls run eagerly until then. What cannot be compiled runs eagerly, with a
          warning. A `compile_config` means `True`.
        - `invariant`: whether the text is the same in any dtype, whatever drafts, whatever the policy decides, however
          the prompt is cut, and whichever greedy rows are in the batch. Compare the text with that of a call in this
          mode without head and policy: stock decoding rounds differently.

        Returns:
            `[b, s + t]` token ids, equal to those of the same call without head and policy, with the same seed. With
            `return_dict_in_generate=True` a `SpeculativeOutput`.

        Raises:
            ValueError: the head is another target's, or the call asks for what a tree cannot do.
        """
        named: dict[str, Any] = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        # by name, and only what was given: a model class may define another `generate`
        arguments = {name: value for name, value in named.items() if value is not None} | kwargs
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        check_prompts(prompts)
        keywords = Keywords(assistant_model, policy, lockstep, compile, invariant)
        call = GenerateCall(keywords, generation_config, arguments, prompts)
        target, state = cast(PreTrainedModel, self), self.speculation_state
        request = resolve(call, self.generation_config, state.defaults, partial(state.assistants.load, target))
        arguments |= request.told  # before the checks, which read it
        with request.admitted(target, state, call) as admitted:
            token = _request.set(admitted)
            try:
                return super().generate(*([] if inputs is None else [inputs]), **arguments)
            finally:
                _request.reset(token)

    def _sample(self, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        """Entry point of decoding: stock calls this because it does not see our drafter.

        Stock passes `inputs_tensor`, the encoder's input, only to a method that names it.
        """
        request, state = _request.get(), self.speculation_state
        if request.is_stock:
            return cast(Any, super())._sample(*args, **kwargs)
        kwargs["inputs_tensor"] = inputs_tensor
        prepared = prepare(cast(PreTrainedModel, self), state, *args, **kwargs)
        return output(prepared, *decode(plan(request, prepared, state), state))
