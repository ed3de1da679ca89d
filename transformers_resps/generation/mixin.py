"""The mixin that `attach` puts in front of a model's class: `generate(..., assistant_model=head, policy=policy)`.

Transformers' own code runs everything before the decoding loop, and every call without a head and a policy.
"""

import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..drafting import DraftSource
from ..policies.base import Policy
from .checks import check_prompts
from .decode import decode
from .keywords import CONFIG_KEYWORDS, CompileChoice, Keywords
from .output import output
from .plan import plan, prepare
from .request import GenerateCall, Request, SpeculationState, resolve


_STOCK = Request()
# The call that runs now. `generate` sets it for `_sample`, since only Transformers' code runs between the two.
_request: ContextVar[Request] = ContextVar("resps_request", default=_STOCK)


class ReSpSGenerationMixin(GenerationMixin):
    """Adds draft trees to `generate`; `attach` puts this class in front of a model's class."""

    @cached_property
    def speculation_state(self) -> SpeculationState:
        """Defaults, loaded assistants, learned costs and compiled code that this model keeps between calls."""
        return SpeculationState()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, so that loading keeps our settings in the `generation_config`."""
        config = self.generation_config
        if config is not None and not vars(config).keys().isdisjoint(CONFIG_KEYWORDS):
            config._from_model_config = False  # else Transformers 5.24 drops unknown settings on loading
        cast(Any, super()).save_pretrained(*args, **kwargs)

    def generate(  # type: ignore[override]  # the parent's is decorated; this adds keywords
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
        """Generate as `GenerationMixin.generate` does, faster with a draft head or a policy.

        All parameters of `GenerationMixin.generate` work. For a keyword that is `None`, the value in the
        `generation_config` is used (`policy`, `lockstep` and `invariant` only), else the default given to `attach`.
        Folders and Hub ids are loaded once and kept with the model.

        - `assistant_model`: drafts the trees. A `DraftHead` or another source, or its folder or Hub id. "mtp", or
          `use_mtp=True` with a policy, selects the model's own MTP layers. With a policy also a small causal model or
          an assistant of Gemma 4. The sources of a list draft one tree together. A `SuffixMemory` holds texts that
          lookup searches; the first memory of a list also stores the texts of this call. Without a policy, any other
          assistant runs Transformers' assisted decoding.
        - `policy`: chooses the size of each tree. An object, or the folder or Hub id of a saved policy. `None` uses
          the head's default tree. "auto" weighs every node against its cost; it keeps what it learned as long as model
          and head live, and without a head it drafts by lookup. "plain" does not draft, whatever `attach` was given.
        - `lockstep`: whether all rows of a batch advance by as many tokens as the row that accepts least. By default
          sampled rows do, so that a seed gives the tokens of plain decoding, and greedy rows do not. `False` lets
          sampled rows advance independently: faster, with the same distribution but other random numbers.
        - `compile`: whether the target's steps run compiled. On a CPU the code contains the weights, and also runs
          over prompts; on a GPU it is a CUDA graph. `True` compiles at first use, for a minute or more. With "auto" on
          a CPU another process compiles, and calls run eagerly until it is done. A call that cannot be compiled runs
          eagerly, with a warning. With `None`, a `compile_config` means `True`.
        - `invariant`: whether the text is exactly the same, also in half precision, with any drafter and policy,
          division of the prompt into chunks, and other greedy rows in the batch. It equals the text of an invariant
          call without head and policy; plain decoding rounds differently.

        Returns token ids `[b, s + t]`, equal to those of the same call without head and policy, with the same seed;
        with `return_dict_in_generate=True` a `SpeculativeOutput`. Raises a `ValueError` if the head was made for
        another target, or if the call asks for something that trees do not support.
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
        # pass by name, and only what the caller gave: a model class may define another `generate`
        arguments = {name: value for name, value in named.items() if value is not None} | kwargs
        prompts = kwargs.get("input_ids") if inputs is None else inputs
        check_prompts(prompts)
        keywords = Keywords(assistant_model, policy, lockstep, compile, invariant)
        call = GenerateCall(keywords, generation_config, arguments, prompts)
        target, state = cast(PreTrainedModel, self), self.speculation_state
        request = resolve(call, self.generation_config, state.defaults, partial(state.assistants.load, target))
        arguments |= request.told  # before the checks, which read the arguments
        with request.admitted(target, state, call) as admitted:
            token = _request.set(admitted)
            try:
                return super().generate(*([] if inputs is None else [inputs]), **arguments)
            finally:
                _request.reset(token)

    def _sample(self, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode a call that Transformers' `generate` has prepared; it calls this method if it gets no assistant."""
        request, state = _request.get(), self.speculation_state
        if request.is_stock:
            return cast(Any, super())._sample(*args, **kwargs)
        kwargs["inputs_tensor"] = inputs_tensor  # the encoder's input, passed only where a signature names it
        prepared = prepare(cast(PreTrainedModel, self), state, *args, **kwargs)
        return output(prepared, *decode(plan(request, prepared, state), state))
