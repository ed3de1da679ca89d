"""Which tokens a head can propose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .examples import Example


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Attributes:
    token_ids: `[d]` target ids, ascending.
    coverage: share of the assistant's tokens that are among them; no acceptance can be above it.
    """

    token_ids: Tensor
    coverage: float


def choose_draft_vocabulary(
    examples: Iterable[Example], vocab_size: int, draft_vocab_size: int, always: Iterable[int] = ()
) -> DraftVocabulary:
    """The most frequent assistant tokens, with the tokens `always` (ends of text and turn) forced in.

    Ties go to the lower id: ids are roughly in order of frequency in byte-pair vocabularies.

    Raises:
        ValueError: `draft_vocab_size` is above `vocab_size`, or no larger than the forced tokens.
    """
    forced = torch.tensor(sorted(set(always)), dtype=torch.long)
    if not len(forced) < draft_vocab_size <= vocab_size:
        raise ValueError(
            f"`draft_vocab_size` is {draft_vocab_size}, but it must be above the {len(forced)} forced tokens and at "
            f"most the target's {vocab_size}. Choose another size; 1/4 of the vocabulary covers most answers."
        )
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        counts += torch.bincount(example.input_ids[example.loss_mask], minlength=vocab_size)
    ranked = counts.clone()
    ranked[forced] = torch.iinfo(torch.long).max
    token_ids = ranked.sort(descending=True, stable=True).indices[:draft_vocab_size].sort().values
    return DraftVocabulary(token_ids, float(counts[token_ids].sum() / counts.sum().clamp(min=1)))
