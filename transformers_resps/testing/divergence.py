"""Finds where two outputs first differ, and decides whether rounding explains the difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel


# How far rounding may move the gap between two logits, in spacings (distances of neighbouring numbers of the dtype).
# A forward over several tokens adds in another order than a forward over one token, and each layer rounds the
# difference into the residual stream, so the gap moves by several spacings. Measured on SmolLM2-135M (30 layers,
# bf16), one-token decoding against forwards over 4, 8, 16 and all tokens, 3,632 gaps between the two best tokens:
# median 0.5 spacings, 99% below 2.5, the largest 6; where the best token changed, the gap was at most 3. In fp32 the
# same gaps move by 3e-6 to 1e-4 and no best token changed, so no difference is excused.
MAX_SPACINGS = 8.0
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of two outputs for one prompt, with logits of a plain forward over the tokens before it."""

    position: int  # index in the output; both outputs are equal before it
    plain_token: int | None  # token of plain decoding; `None` when its output had ended
    speculative_token: int | None  # token of the other output; `None` when it had ended
    plain_logit: float
    speculative_logit: float
    best_logit: float
    dtype: torch.dtype
    # With sampling or logits processors: by how many spacings a token's logit must rise until plain decoding, with the
    # same random numbers, picks the token. This is the maximum over both tokens, rounded up to a power of two, and
    # infinite above `MAX_SPACINGS`. `None` if the logits alone decide.
    needed: float | None = None
    invariant: bool = False  # whether both outputs are from the exact mode (`invariant`), where rounding is the same

    @property
    def gap(self) -> float:
        """Best logit minus the logit of the less likely of both tokens; 0 is a perfect tie."""
        return self.best_logit - min(self.plain_logit, self.speculative_logit)

    @property
    def spacing(self) -> float:
        """Distance between neighbouring numbers of the model's dtype at the best logit."""
        # One scale is enough: logits change because hidden states are rounded, and all tokens share these states
        return spacing_at(self.best_logit, self.dtype)

    @property
    def spacings(self) -> float:
        """Number of spacings by which rounding must have moved the logits, if it caused the difference."""
        if math.isinf(self.gap):
            return math.inf
        return self.gap / self.spacing if self.needed is None else self.needed

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference: half precision, at most `MAX_SPACINGS`, and not the exact mode."""
        return not self.invariant and self.dtype in HALF_PRECISIONS and self.spacings <= MAX_SPACINGS

    def __str__(self) -> str:
        spacings = f"{self.spacings:.1f}" if self.needed is None else f"up to {self.spacings:g}"
        return (
            f"position {self.position}: plain wrote {self.plain_token}, speculative {self.speculative_token}; "
            f"logit gap {self.gap:.4g}, {spacings} spacings of the dtype"
        )


@torch.inference_mode()
def explain_divergence(
    model: PreTrainedModel, prompt_ids: Tensor, plain_ids: Tensor, speculative_ids: Tensor, *, invariant: bool = False
) -> Divergence | None:
    """Return the first difference of two greedy outputs of `model` for a prompt `[s]`; `None` if they are equal.

    The result is meaningless after sampling or logits processors, because it depends only on logits. `plain_ids` `[t]`
    is the output of plain `generate`, `speculative_ids` `[t']` the output to check, both without prompt and padding.
    """
    plain, speculative = plain_ids.tolist(), speculative_ids.tolist()
    position = first_difference(plain, speculative)
    if position is None:
        return None
    prefix = torch.cat([prompt_ids, plain_ids[:position].to(prompt_ids.device)])[None]  # [1, s + position]
    logits = model(input_ids=prefix.to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def token_and_logit(output: list[int]) -> tuple[int | None, float]:
        return (output[position], float(logits[output[position]])) if position < len(output) else (None, -math.inf)

    (plain_token, plain_logit), (other_token, other_logit) = map(token_and_logit, (plain, speculative))
    logits_of_both = plain_logit, other_logit, float(logits.max())
    return Divergence(position, plain_token, other_token, *logits_of_both, model.dtype, invariant=invariant)


def first_difference(output: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first index at which two outputs differ (or the shorter output ends); `None` if they are equal."""
    pairs = enumerate(zip_longest(output, other))
    return next((position for position, (token, another) in pairs if token != another), None)


def spacing_at(value: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of `dtype` around `value`.

    >>> spacing_at(20.0, torch.bfloat16), spacing_at(20.0, torch.float32)
    (0.125, 1.9073486328125e-06)
    """
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))
