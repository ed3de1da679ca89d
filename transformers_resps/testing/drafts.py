"""Compute what the target would draw, and what a drafter would propose, at every place of a text.

From the text alone, so that the engine can be compared with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting.candidate_generator import TreeCandidateGenerator
from ..drafting.prompt_lookup import Lookup
from ..head import BoundHead, DraftHead
from ..policy import FixedPolicy
from ..target.features import FeatureTap
from ..tree import TreeShape


@dataclass(frozen=True, slots=True)
class Place:
    """One token of an answer, and what could have stood there.

    Attributes:
        token: that was written.
        probs: `[v]` fp32, the target's distribution given the text before it.
        drafted: the drafter's best tokens there, best first.
        draft_probs: the probability that the drafter gives to each of them.
    """

    token: int
    probs: Tensor
    drafted: list[int]
    draft_probs: list[float]


class DraftReader:
    """Reads texts with a target and its drafter: the head, or prompt lookup without one."""

    def __init__(self, target: PreTrainedModel, head: DraftHead | None) -> None:
        self._target = target
        self._bound = None if head is None else BoundHead(head, target)

    @torch.inference_mode()
    def read(self, prompt: Tensor, answer: Tensor, drafts: int) -> list[Place]:
        """Every token of `answer` `[t]` after `prompt` `[s]`, each with up to `drafts` drafted tokens.

        The first has none: the engine picks it before anything is drafted.
        """
        device = self._target.device
        text = torch.cat([prompt.to(device), answer.to(device)])
        if self._bound is None:
            logits = self._logits(text[:-1], len(answer))
            drafted = _looked_up(text.tolist(), len(prompt))
        else:
            with (
                FeatureTap(self._target, self._bound.head.config.feature_layers or []) as tap,
                tap.record() as features,
            ):
                logits = self._logits(text[:-1], len(answer))
            drafted = self._from_head(features.concatenated(), text, len(prompt), drafts)
        probs = logits.float().softmax(-1).cpu()
        return [Place(token, probs[place], *drafted[place]) for place, token in enumerate(answer.tolist())]

    def _logits(self, text: Tensor, most: int) -> Tensor:
        """Of one plain forward over `text` `[s]`: the last `most` rows, `[most, v]`."""
        logits: Tensor = self._target(input_ids=text[None], use_cache=False, logits_to_keep=most).logits[0]
        return logits

    def _from_head(
        self, features: Tensor, text: Tensor, start: int, drafts: int
    ) -> list[tuple[list[int], list[float]]]:
        """The head's best children of each token from `start` on, as its first level has them."""
        assert self._bound is not None
        generator = TreeCandidateGenerator(self._bound, 1, None)
        shape, policy = TreeShape(drafts + 1, 1, drafts), FixedPolicy(TreeShape.plain())
        found: list[tuple[list[int], list[float]]] = [([], [])]
        read = 0
        for place in range(start, len(text) - 1):
            generator.observe(features[:, read:place], text[None, read + 1 : place + 1])
            read = place
            pool = generator.draft(shape, policy)
            found.append((pool.tokens[0].tolist(), pool.scores[0].exp().tolist()))
        return found


def _looked_up(text: list[int], start: int) -> list[tuple[list[int], list[float]]]:
    """The token that followed the last time, with its probability from the track record."""
    lookup = Lookup()
    lookup.extend(text[: start + 1])
    found: list[tuple[list[int], list[float]]] = [([], [])]
    for token in text[start + 1 :]:
        match = lookup.match(1)
        found.append((match.tokens, match.prefix_accept_probs))
        lookup.extend([token])
    return found
