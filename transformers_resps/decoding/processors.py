"""Apply the caller's logits processors to the scores at each node of a draft tree, given the text up to the node."""

from collections import Counter
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..tree import DraftTree


# Names of Transformers' processors without a state: their result for a row depends on its scores and text alone.
# SynthID and guidance keep a state, prefix constraints read the row's number.
_READ_SCORES = frozenset(  # these read scores alone
    ("TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper")
    + ("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor")
    + ("SuppressTokensLogitsProcessor", "LogitNormalization")
)
_READ_TEXTS = frozenset(  # these also read the text, or its length
    ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor")
    + ("NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor")
    + ("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor")
    + ("ExponentialDecayLengthPenalty",)
)
# This processor is stateless too, but copies each text to the host, which would waste time on rejected nodes.
_READ_TEXTS_ON_HOST = frozenset({"WatermarkLogitsProcessor"})
STATELESS = _READ_SCORES | _READ_TEXTS | _READ_TEXTS_ON_HOST


def is_stateless(processor: object, names: frozenset[str] = STATELESS) -> bool:
    """Whether a processor's class is one of Transformers' `names`, and no row's result depends on other rows."""
    processor_class = type(processor)
    is_stock = processor_class.__name__ in names and processor_class.__module__.startswith("transformers.generation.")
    # a repetition penalty may store a prompt length for each row
    return is_stock and isinstance(getattr(processor, "prompt_ignore_length", None), int | None)


class TreeLogitsProcessor(LogitsProcessor):
    """Applies logits processors to all nodes of a tree: in one call, or level by level if they read texts.

    Use it only if `supports` returns true; otherwise `Text.commit` calls the processors, position after position.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        groups = groupby(processors, lambda processor: not is_stateless(processor, _READ_SCORES))
        self._groups = [(reads_texts, LogitsProcessorList(group)) for reads_texts, group in groups]
        self.reads_texts = any(reads_texts for reads_texts, _ in self._groups)  # whether any processor reads the text

    @staticmethod
    def supports(processors: LogitsProcessorList) -> bool:
        """Whether all processors are stateless, and cheap enough to run also at nodes that will be rejected."""
        return all(is_stateless(one, _READ_SCORES | _READ_TEXTS) for one in processors)

    def __call__(self, input_ids: Tensor, scores: Tensor, tree: DraftTree) -> Tensor:  # type: ignore[override]
        """Process the scores `[n, v]` at the nodes of one row's tree, given the text up to each node.

        `input_ids` `[1, s]` ends in the root; it may be any tensor if `reads_texts` is false.
        """
        for reads_texts, processors in self._groups:
            if reads_texts:
                order, prefixes = _levels(input_ids, tree)
                levels = zip(prefixes, scores[order].split([len(level) for level in prefixes]), strict=True)
                scores = torch.cat([_processed(processors, *level) for level in levels])[order.argsort()]
            else:
                scores = _processed(processors, tree.tokens.T, scores)
        return scores


def _levels(input_ids: Tensor, tree: DraftTree) -> tuple[Tensor, list[Tensor]]:
    """Return the nodes `[n]` sorted by depth, and for each depth the texts `[nodes, s + depth]` up to its nodes."""
    order = tree.depths[0].argsort(stable=True)
    parents, tokens = order.argsort()[tree.parents[0, order]], tree.tokens[0, order, None]
    prefixes, begin, level_begin = [input_ids], 1, 0
    for _, size in sorted(Counter(tree.depths[0].tolist()).items())[1:]:
        above = prefixes[-1][parents[begin : begin + size] - level_begin]
        prefixes.append(torch.cat([above, tokens[begin : begin + size]], dim=1))
        level_begin, begin = begin, begin + size
    return order, prefixes


def _processed(processors: LogitsProcessorList, input_ids: Tensor, scores: Tensor) -> Tensor:
    return processors(cast(Any, input_ids), cast(Any, scores))
