"""Choose the tokens that a head can propose, and compute their share among all tokens of the answers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafting import TrainableSource
from .preparation import Example


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The tokens that a head can propose, and their share among all tokens of the training answers."""

    token_ids: Tensor  # [d] target ids, ascending
    coverage: float  # share of the answers' tokens that the head can propose: an upper bound of acceptance


def choose_draft_vocabulary(
    examples: Iterable[Example], vocab_size: int, draft_vocab_size: int, always: Iterable[int] = ()
) -> DraftVocabulary:
    """Choose `draft_vocab_size` token ids: all of `always`, then the most frequent tokens of the assistant's turns.

    Among equally frequent tokens, low ids are preferred: in byte-pair vocabularies they tend to be frequent. Raises a
    `ValueError` if `draft_vocab_size` is above `vocab_size` or not above the number of `always` tokens, or if an id in
    `always` or `examples` is not in the target's vocabulary.
    """
    forced = torch.tensor(sorted(set(always)), dtype=torch.long)
    if not len(forced) < draft_vocab_size <= vocab_size:
        raise ValueError(
            f"`draft_vocab_size` is {draft_vocab_size}, but it must be above the {len(forced)} forced tokens and at "
            f"most the target's {vocab_size}. Choose another size; a quarter of the vocabulary covers most outputs."
        )
    if len(forced) and not 0 <= int(forced[0]) <= int(forced[-1]) < vocab_size:
        raise ValueError(
            f"The forced tokens go from {int(forced[0])} to {int(forced[-1])}, but the target's ids go from 0 to "
            f"{vocab_size - 1}. Leave out the others."
        )
    counts = _answer_counts(examples, vocab_size)
    ranked = counts.clone()
    ranked[forced] = torch.iinfo(torch.long).max
    token_ids = ranked.sort(descending=True, stable=True).indices[:draft_vocab_size].sort().values
    return DraftVocabulary(token_ids, _share(counts, token_ids))


def vocabulary_of(head: TrainableSource, examples: Iterable[Example]) -> DraftVocabulary:
    """Return a head's draft vocabulary with its coverage of `examples`; raise `ValueError` if the coverage is 0."""
    token_ids = head.draft_token_ids.cpu()
    coverage = _share(_answer_counts(examples, head.vocab_size), token_ids)
    if coverage == 0:
        raise ValueError(
            f"The head can propose {len(token_ids)} tokens, but none of them occurs in the answers. Start from "
            "another head, or from a fresh one, whose vocabulary is counted from your texts."
        )
    return DraftVocabulary(token_ids, coverage)


def _answer_counts(examples: Iterable[Example], vocab_size: int) -> Tensor:
    """Count how often each token of the vocabulary occurs in the assistant's turns, `[v]`."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for number, example in enumerate(examples):
        example.check_ids(vocab_size, number)
        written = example.input_ids[example.loss_mask]
        counts.index_add_(0, written, torch.ones_like(written))
    return counts


def _share(counts: Tensor, token_ids: Tensor) -> float:
    return float(counts[token_ids].sum() / counts.sum().clamp(min=1))
