"""The drafter of one call: a `CandidateGenerator` of Transformers that can also propose trees."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from ..tree import CandidatePool, DraftTree, TreeShape


# Decides whether to draft another level, given the number of drafted levels and the scores `[b, k]` of the nodes that
# would get children.
GoesOn = Callable[[int, Tensor], bool]


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Describes the draft that a decoding step needs."""

    shape: TreeShape  # limits the levels (at least one), the children of a node, and the lookup nodes
    goes_on: GoesOn | None = None  # decides after each level whether to draft the next one; `None` drafts all levels
    least_prob: float = 0.0  # minimum acceptance probability of nodes from a lookup


class Committed(NamedTuple):
    """Tokens that were added to the text: first the prompt and one token of the target, later those of each step."""

    tokens: Tensor  # [b, t]; a row that gained fewer than t tokens repeats its last token
    # [b, t, F] features of the target at the position before each token; with a prompt [b, t - 1, F], since no
    # position is before its first token. `None` if no drafter reads features.
    features: Tensor | None = None
    rows: Sequence[Sequence[int]] | None = None  # tokens that each row gained, on the host; `None` if all gained t
    tree: DraftTree | None = None  # the tree from which the tokens were accepted; `None` for the prompt
    logits: Tensor | None = None  # [b, n or more, v] of the target, after each node of the tree


class Drafter(CandidateGenerator, ABC):
    """Proposes tokens for the rows of one call of `generate`.

    This library's decoding loop gets the nodes of a tree; Transformers' assisted decoding gets the tree's best path as
    a chain. A subclass implements `draft`, `observe` and `keep_rows`.
    """

    feature_layers: Sequence[int] = ()  # see `DraftSource`
    reads_text: bool = False  # whether `draft` needs the whole text, not only its newest token
    proposable_tokens: int  # number of different tokens that it can propose after a node
    most_levels: int | None = None  # maximum number of levels that it can draft; `None` for no limit
    drafts_at_once: bool = False  # whether one pass drafts all levels, so that more levels take almost no more time
    built_tree: DraftTree | None = None  # the newest draft as a tree of the requested size; `None` if only a pool
    chain_length: int = 5  # number of tokens of a chain for Transformers' loop
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_hidden_states": True}  # read by Transformers' loop
    _told = 0  # number of tokens that Transformers' loop has passed to `observe` so far

    @property
    def requires_model_outputs(self) -> bool:  # type: ignore[override]
        """Whether Transformers' loop must pass the target's outputs."""
        return bool(self.feature_layers)

    @abstractmethod
    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """Return a pool of nodes drafted below the newest token of each row.

        `input_ids` are the text `[b, s]` or, without `reads_text`, its newest tokens.
        """

    @abstractmethod
    def observe(self, committed: Committed) -> None:
        """Receive tokens that were added to the text. The loop calls this after the prompt and after each step."""

    @property
    def num_drafting_tokens(self) -> int:
        """Most tokens that `get_candidates` drafts."""
        return min(self.chain_length, self.most_levels or self.chain_length)

    def get_candidates(
        self, input_ids: Tensor, *, model_outputs: Any = None, **kwargs: Any
    ) -> tuple[torch.LongTensor, Any]:
        """Return the text `input_ids` `[1, s]` with a drafted chain of c tokens, `[1, s + c]`, and `None` for logits.

        Transformers' loop passes as `model_outputs` the outputs, with hidden states, of its newest forward.
        """
        if self.feature_layers and model_outputs is None:  # before the prompt is read
            return cast(torch.LongTensor, input_ids), None
        tokens = input_ids[:, self._told :]
        self.observe(Committed(tokens, self._features(model_outputs, tokens.shape[1])))
        self._told = input_ids.shape[1]
        depth = self.num_drafting_tokens
        pool = self.draft(input_ids, DraftRequest(TreeShape(depth + 1, depth, 1, lookup=depth))).on_host()
        chain = input_ids.new_tensor([_best_path(pool)], dtype=torch.long)
        return cast(torch.LongTensor, torch.cat([input_ids, chain], dim=1)), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Do nothing: Transformers' loop passes new tokens to the next call of `get_candidates`, ours to `observe`."""

    def _features(self, outputs: Any, count: int) -> Tensor | None:
        """Return the target's features `[1, t, F]` at the position before each of the last `count` tokens."""
        if not self.feature_layers:
            return None
        states = outputs.hidden_states
        if max(self.feature_layers) >= len(states) - 1:
            raise ValueError(
                f"The drafter reads hidden state {max(self.feature_layers)} before the final norm, which no "
                "loop of Transformers gives. Pass the source to `generate` of an attached model."
            )
        return torch.cat([states[layer][:, :count] for layer in self.feature_layers], dim=-1)

    def read(self, at_least: int = 1) -> None:
        """Process observed tokens now if at least `at_least` are unprocessed. Otherwise the next `draft` does so."""
        return None

    def take_compile_seconds(self) -> float:
        """Return the seconds spent on compiling since this method was last called."""
        return 0.0

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows of the batch except `rows`."""


def _best_path(pool: CandidatePool) -> list[int]:
    """Return the tokens of the path to the likeliest node of the deepest level, ignoring nodes of probability 0."""
    tokens, parents, scores = (part[0].tolist() for part in (pool.tokens, pool.parents, pool.scores))
    levels = pool.levels.tolist()
    possible = [place for place, score in enumerate(scores) if score > -torch.inf]
    node = max(possible, key=lambda place: (levels[place], scores[place]), default=-1)
    path = list[int]()
    while node >= 0:
        path.insert(0, tokens[node])
        node = parents[node]
    return path
