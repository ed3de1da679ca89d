"""Apply the caller's logits processors to all nodes of a draft tree, each node with its prefix."""

from collections import Counter
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..tree import DraftTree


# Processors of Transformers without a state, by exact type: their scores depend on a row's scores and text alone.
# SynthID and guidance keep a state, prefix constraints get the row's number, others belong to encoders and speech.
_READ_SCORES = frozenset(  # scores alone
    (
        "TemperatureLogitsWarper",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "LogitNormalization",
    )
)
_READ_TEXTS = frozenset(  # also the text, or its length
    (
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "ExponentialDecayLengthPenalty",
    )
)
# Stateless too, but it reads each text on the host: nodes off the path would cost time.
_READ_TEXTS_ON_HOST = frozenset({"WatermarkLogitsProcessor"})
STATELESS = _READ_SCORES | _READ_TEXTS | _READ_TEXTS_ON_HOST


def is_stateless(processor: object, names: frozenset[str] = STATELESS) -> bool:
    """Whether a processor's result for a row depends on that row alone, judged by its exact type."""
    processor_class = type(processor)
    is_stock = processor_class.__name__ in names and processor_class.__module__.startswith("transformers.generation.")
    # a repetition penalty may have one prompt length for each row
    return is_stock and isinstance(getattr(processor, "prompt_ignore_length", None), int | None)


class TreeLogitsProcessor(LogitsProcessor):
    """Applies a call's processors to all nodes of a tree: in one call, or level by level where they read texts.

    `Text.commit` calls processors that `supports` does not know, in commit order.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        groups = groupby(processors, lambda processor: not is_stateless(processor, _READ_SCORES))
        self._groups = [(reads_texts, LogitsProcessorList(group)) for reads_texts, group in groups]
        self.reads_texts = any(reads_texts for reads_texts, _ in self._groups)  # does any read more than scores?

    @staticmethod
    def supports(processors: LogitsProcessorList) -> bool:
        """Whether all are stateless, and cheap at nodes off the path."""
        return all(is_stateless(one, _READ_SCORES | _READ_TEXTS) for one in processors)

    def __call__(self, input_ids: Tensor, scores: Tensor, tree: DraftTree) -> Tensor:  # type: ignore[override]
        """Process the scores `[n, v]` of a tree of one row, as calls with the text up to each node would.

        `input_ids` `[1, s]` ends in the root; it may be any tensor where no processor `reads_texts`.
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
    """Return the nodes `[n]` by level, and for each level the texts `[nodes, s + depth]` up to its nodes."""
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
