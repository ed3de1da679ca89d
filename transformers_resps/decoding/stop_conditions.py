"""Read from stopping criteria when a text ends, so that plain greedy decoding need not ask them for each token."""

from dataclasses import dataclass

from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a text ends, and how long it may get before a criterion logs a warning.

    Attributes:
        token_ids: any of them, once picked.
        length: positions that it may reach.
        warning_free_length: positions up to which the criteria log nothing: Transformers warns of longer texts.
    """

    token_ids: frozenset[int]
    length: int
    warning_free_length: int

    def are_silent(self, length: int) -> bool:
        """Whether no criterion logs a warning of a text before it ends, or reaches `length` positions."""
        return self.warning_free_length == self.length or length <= self.warning_free_length

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "StopConditions | None":
        """Read them; `None` where anything but end tokens and a length may stop a text."""
        lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        tokens = [one for one in criteria if type(one) is EosTokenCriteria]
        if not lengths or len(lengths) + len(tokens) < len(criteria):
            return None
        token_ids = frozenset(token for one in tokens for token in one.eos_token_id.flatten().tolist())
        length = min(one.max_length for one in lengths)
        silent = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
        return cls(token_ids, length, min([length, *silent]))
