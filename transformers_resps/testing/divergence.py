"""Where two outputs differ first, and whether rounding explains it.

`move_of_gaps` (`resps verify --rounding`) measures on any machine what `MAX_SPACINGS` was set by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import tqdm

from ..compat import CACHE_KEYWORD
from ..tree import DraftTree
from ..verifying.growing import TreeVerifier


# The most spacings by which rounding may move the gap between two logits. A forward over several tokens adds in
# another order than a forward over one, and each layer rounds the difference into the residual stream, so the gap
# moves by a few spacings rather than by one. Measured on SmolLM2-135M (30 layers, bf16), one-token decoding against
# forwards over 4, 8, 16 and all tokens, 3,632 gaps between the two best tokens: median 0.5 spacings, 99% below 2.5,
# the largest 6; where the best token flipped, the gap was 3 at most. In fp32, where the same gaps move by 3e-6 to
# 1e-4, no token flipped and none is excused.
MAX_SPACINGS = 8.0
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where two outputs to one prompt differ.

    Attributes:
        needed: for outputs with logits processors or sampling, where bare logits say little: spacings by which the
            logit of either token must rise before plain decoding, with the same random numbers, picks it there; the
            larger of both, rounded up to a power of two, infinite beyond `MAX_SPACINGS`. `None` where bare logits
            decide.
    """

    position: int  # index in the output; both outputs are equal before it
    plain_token: int | None  # that plain decoding wrote there; `None` when its output had ended
    speculative_token: int | None  # likewise
    plain_logit: float  # of `plain_token`, from one plain forward over the prompt and the common part
    speculative_logit: float  # from the same forward
    best_logit: float  # the largest of that forward
    dtype: torch.dtype
    needed: float | None = None
    invariant: bool = False  # whether both were written in the invariant mode, which rounds every token alike

    @property
    def gap(self) -> float:
        """Distance of the less likely token from the best logit: 0 is a perfect tie."""
        return self.best_logit - min(self.plain_logit, self.speculative_logit)

    @property
    def spacing(self) -> float:
        """The distance between neighbouring numbers of the model's dtype at the best logit.

        Not at the tokens' own logits: what moves a logit is the rounding of the hidden states, alike for all tokens.
        """
        return spacing_at(self.best_logit, self.dtype)

    @property
    def spacings(self) -> float:
        """By how many spacings rounding must have moved logits."""
        if math.isinf(self.gap):
            return math.inf
        return self.gap / self.spacing if self.needed is None else self.needed

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference: in half precision, within `MAX_SPACINGS` of the pick.

        Nothing is explained in the invariant mode, nor an output that ends early: an end token is compared like any
        other token.
        """
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
    """Compare two greedy outputs of `model` to one prompt; `None` when they are equal.

    It judges bare logits: with a logits processor, or sampling, the gap says nothing.

    Args:
        model: wrote both outputs; runs once more, over the prompt and the common part, and only if they differ.
        prompt_ids: `[s]`, without padding.
        plain_ids: `[t]` the output of plain `generate`, without the prompt.
        speculative_ids: `[t']` the output to judge, without the prompt.
        invariant: whether both were written with `invariant=True`.
    """
    plain, speculative = plain_ids.tolist(), speculative_ids.tolist()
    position = first_difference(plain, speculative)
    if position is None:
        return None
    prefix = torch.cat([prompt_ids, plain_ids[:position].to(prompt_ids.device)])[None]  # [1, s + position]
    logits = model(input_ids=prefix.to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def token_and_logit(output: list[int]) -> tuple[int | None, float]:
        return (output[position], float(logits[output[position]])) if position < len(output) else (None, -math.inf)

    plain_token, plain_logit = token_and_logit(plain)
    speculative_token, speculative_logit = token_and_logit(speculative)
    return Divergence(
        position=position,
        plain_token=plain_token,
        speculative_token=speculative_token,
        plain_logit=plain_logit,
        speculative_logit=speculative_logit,
        best_logit=float(logits.max()),
        dtype=model.dtype,
        invariant=invariant,
    )


def first_difference(output: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two outputs differ, which may be the end of one; `None` when they are equal."""
    pairs = enumerate(zip_longest(output, other))
    return next((position for position, (token, another) in pairs if token != another), None)


def spacing_at(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` around `value`.

    >>> spacing_at(20.0, torch.bfloat16), spacing_at(20.0, torch.float32)
    (0.125, 1.9073486328125e-06)
    """
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


@dataclass(frozen=True, slots=True)
class Moves:
    """What a forward over several tokens changes, at all positions of some outputs; gaps are in spacings."""

    nodes: int  # of each forward; 0 for one forward over everything
    moves: Tensor  # [t] by how much the gap between the two best tokens moved
    flipped: Tensor  # [f] the gaps where another token became the best

    def __str__(self) -> str:
        middle, high = (float(self.moves.quantile(share)) for share in (0.5, 0.99))
        flips = f"{len(self.flipped)} flips"
        if len(self.flipped):
            flips += f" at gaps up to {float(self.flipped.max()):.2f}"
        return (
            f"{len(self.moves)} gaps moved by {middle:.2f} spacings in the median, 99% below {high:.2f}, at most "
            f"{float(self.moves.max()):.2f}; {flips}"
        )


@torch.inference_mode()
def move_of_gaps(
    target: PreTrainedModel, prompts: list[Tensor], max_new_tokens: int, node_counts: list[int]
) -> list[Moves]:
    """Continue prompts `[s]` greedily, a token at a time and past end tokens, and read the outputs again in trees.

    Each tree is a chain of one of `node_counts`; 0 is one forward over prompt and output, without a cache.
    """
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {count: [] for count in node_counts}
    for prompt in tqdm(prompts, desc="Comparing forwards", unit="prompt"):
        output, plain = _decode(target, prompt.to(target.device), max_new_tokens)
        for count in node_counts:
            logits = _read(target, prompt.to(target.device), output, count)
            rows[count] += zip(plain, logits, strict=True)
    return [_moves(count, pairs, target.dtype) for count, pairs in rows.items()]


def _decode(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """The greedy output `[t]`, and the logits `[v]` after each of its tokens."""
    options: Any = {CACHE_KEYWORD: DynamicCache(config=target.config.get_text_config(decoder=True))}
    options |= {"use_cache": True, "logits_to_keep": 1}
    token = target(input_ids=prompt[None], **options).logits[0, -1].argmax()
    output, rows = [], []
    for _ in range(max_new_tokens):
        output.append(token)
        logits = target(input_ids=token[None, None], **options).logits[0, -1]
        rows.append(logits.cpu())
        token = logits.argmax()
    return torch.stack(output), rows


def _read(target: PreTrainedModel, prompt: Tensor, output: Tensor, node_count: int) -> list[Tensor]:
    """The same logits from chains of `node_count` nodes, which are verified and kept as in decoding."""
    if node_count == 0:
        text = torch.cat([prompt, output])[None]
        return list(target(input_ids=text, use_cache=False, logits_to_keep=len(output)).logits[0].cpu())
    rows: list[Tensor] = []
    with TreeVerifier.of(target, len(prompt)) as verifier:
        verifier.prefill(prompt[None], logits_to_keep=1)
        for tokens in output[None].split(node_count, dim=1):
            order = torch.arange(tokens.shape[1], device=target.device)[None]
            logits, _ = verifier.verify(DraftTree.from_parents(tokens, (order - 1).clamp(min=0)))
            verifier.keep(order, order.tolist())
            rows += logits[0].cpu()
    return rows


def _moves(node_count: int, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Moves:
    moves, flipped = [], []
    for plain, tree in pairs:
        best = plain.float().topk(2)
        gap, spacing = float(best.values[0] - best.values[1]), spacing_at(float(best.values[0]), dtype)
        other = tree.float()[best.indices]
        moves.append(abs(float(other[0] - other[1]) - gap) / spacing)
        if int(tree.argmax()) != int(plain.argmax()):
            flipped.append(gap / spacing)
    return Moves(node_count, torch.tensor(moves), torch.tensor(flipped))
