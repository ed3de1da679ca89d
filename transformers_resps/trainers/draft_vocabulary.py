"""Which tokens a head can propose."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import DraftHead
from .examples import Example, check_token_ids


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The tokens that a head can propose, and how much of the answers they are.

    Attributes:
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
        ValueError: `draft_vocab_size` is above `vocab_size`, or no larger than the forced tokens; or these or the
            texts are another tokenizer's.
    """
    forced = torch.tensor(sorted(set(always)), dtype=torch.long)
    if not len(forced) < draft_vocab_size <= vocab_size:
        raise ValueError(
            f"`draft_vocab_size` is {draft_vocab_size}, but it must be above the {len(forced)} forced tokens and at "
            f"most the target's {vocab_size}. Choose another size; 1/4 of the vocabulary covers most answers."
        )
    if len(forced) and not 0 <= int(forced[0]) <= int(forced[-1]) < vocab_size:
        raise ValueError(
            f"The forced tokens go from {int(forced[0])} to {int(forced[-1])}, but the target's ids from 0 to "
            f"{vocab_size - 1}. Leave out those that it does not know."
        )
    counts = _answer_counts(examples, vocab_size)
    ranked = counts.clone()
    ranked[forced] = torch.iinfo(torch.long).max
    token_ids = ranked.sort(descending=True, stable=True).indices[:draft_vocab_size].sort().values
    return DraftVocabulary(token_ids, _share(counts, token_ids))


def vocabulary_of(head: DraftHead, examples: Iterable[Example]) -> DraftVocabulary:
    """The draft vocabulary that `head` has, and what it covers of the assistant's tokens in `examples`.

    Raises:
        ValueError: it covers none of the assistant's tokens, so no step could teach or accept anything.
    """
    token_ids = head.draft_token_ids.cpu()
    coverage = _share(_answer_counts(examples, head.config.vocab_size), token_ids)
    if coverage == 0:
        raise ValueError(
            f"The head can propose {len(token_ids)} tokens, and none of them occurs in the answers. A head learns and "
            "drafts only tokens of its own vocabulary. Start from another head, or from a fresh one, whose vocabulary "
            "is counted from your texts."
        )
    return DraftVocabulary(token_ids, coverage)


def _answer_counts(examples: Iterable[Example], vocab_size: int) -> Tensor:
    """How often the assistant wrote each token, `[v]`."""
    counts, examples = torch.zeros(vocab_size, dtype=torch.long), list(examples)
    check_token_ids(examples, vocab_size)
    for example in examples:
        counts += torch.bincount(example.input_ids[example.loss_mask], minlength=vocab_size)
    return counts


def _share(counts: Tensor, token_ids: Tensor) -> float:
    return float(counts[token_ids].sum() / counts.sum().clamp(min=1))
