"""What Transformers has prepared of a call when decoding begins."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..compat import CACHE_KEYWORD
from ..decoding.text import Text


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """The inputs of one call of `generate`, as stock `generate` hands them to the method that decodes.

    Attributes:
        input_ids: `[b, s]` the prompts.
        logits_processor: as merged by Transformers.
        stopping_criteria: likewise.
        config: the `GenerationConfig` of the call.
        streamer: the caller's, or `None`.
        model_kwargs: cache, mask and positions; whatever else the target's forward takes.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: Any
    streamer: Any
    model_kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        return self.model_kwargs[CACHE_KEYWORD]

    @property
    def max_length(self) -> int:
        """Positions a text may reach: a fraction is rounded up, and no limit is `sys.maxsize`."""
        most: float = self.config.max_length
        return math.ceil(most) if most < sys.maxsize else sys.maxsize

    @property
    def is_cache_given(self) -> bool:
        """Whether the cache is the caller's, who may reuse it."""
        return bool(getattr(self.cache, "_is_user_defined", False))

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
        )
