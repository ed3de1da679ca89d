"""The drafter of one call: a candidate generator of Transformers' own type that proposes trees, too."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from ..tree import CandidatePool, DraftTree, TreeShape


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """The draft that a step asks for.

    Attributes:
        shape: up to `depth` levels, at least one, of `top_k` children per node; a lookup gives up to `lookup` nodes.
        goes_on: decides about another level, by the levels drafted and the scores `[b, k]` of the nodes that would
            get children; `None` drafts all levels.
        least_prob: acceptance probability below which a node ends a lookup's chain.
    """

    shape: TreeShape
    goes_on: Callable[[int, Tensor], bool] | None = None
    least_prob: float = 0.0


class Committed(NamedTuple):
    """Tokens that the text has gained, at first the prompt and the target's pick after it.

    Attributes:
        tokens: `[b, t]`. A row that gained fewer repeats its last.
        features: `[b, t, F]` the target's, at the position before each token; a prompt has one less. `None` where no
            drafter reads features.
        rows: the tokens that each row gained, on the host; `None` where all rows gained t.
        tree: the tree that held them; `None` for the prompt.
    """

    tokens: Tensor
    features: Tensor | None = None
    rows: Sequence[Sequence[int]] | None = None
    tree: DraftTree | None = None


class Drafter(CandidateGenerator, ABC):
    """Drafts for the rows of one call.

    Our loop asks it for the nodes of a tree, Transformers' assisted decoding for a chain: its best path. A subclass
    writes `draft` and `observe`.

    Attributes:
        feature_layers: the target's hidden states that it reads, by index, 0 being the embeddings; empty for none.
        reads_text: whether it wants the whole text with each request; others get the newest token alone.
        proposable_tokens: how many tokens it can propose after a node.
        most_levels: how many levels it can draft; `None` for any number.
        drafts_at_once: whether one pass gives all levels, so that more of them or of their nodes take next to no time.
        built_tree: tree of the newest draft with all nodes asked for; `None` where the draft gave the pool alone.
        chain_length: tokens of a chain, where Transformers' loop asks.
    """

    feature_layers: Sequence[int] = ()
    reads_text: bool = False
    proposable_tokens: int
    most_levels: int | None = None
    drafts_at_once: bool = False
    built_tree: DraftTree | None = None
    chain_length: int = 5
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_hidden_states": True}  # Asked by Transformers' loop.
    _told = 0  # Tokens that Transformers' loop has shown.

    @property
    def requires_model_outputs(self) -> bool:  # type: ignore[override]
        """Asked by Transformers' loop."""
        return bool(self.feature_layers)

    @abstractmethod
    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """Draft the nodes below the newest token of `[b, s]`; see `get_candidates`."""

    @abstractmethod
    def observe(self, committed: Committed) -> None:
        """Take in the tokens that the text has gained."""

    @overload
    def get_candidates(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool: ...

    @overload
    def get_candidates(
        self, input_ids: Tensor, request: None = None, *, model_outputs: Any = None, **kwargs: Any
    ) -> tuple[torch.LongTensor, Any]: ...

    def get_candidates(
        self, input_ids: Tensor, request: DraftRequest | None = None, *, model_outputs: Any = None, **kwargs: Any
    ) -> CandidatePool | tuple[torch.LongTensor, Any]:
        """Propose what follows.

        Args:
            input_ids: `[b, s]` the text, or its newest token where the drafter does not want more.
            request: what our loop asks for; `None` asks for a chain, as Transformers does.
            model_outputs: outputs of the newest forward in Transformers' loop, with hidden states.
            kwargs: other arguments of Transformers' loop.

        Returns:
            The nodes of a tree; or the text with a chain after it `[1, s + c]`, and no logits.
        """
        if request is not None:
            return self.draft(input_ids, request)
        if self.feature_layers and model_outputs is None:  # before the prompt is read
            return cast(torch.LongTensor, input_ids), None
        tokens = input_ids[:, self._told :]
        self.observe(Committed(tokens, self._features(model_outputs, tokens.shape[1])))
        self._told = input_ids.shape[1]
        depth = min(self.chain_length, self.most_levels or self.chain_length)
        pool = self.draft(input_ids, DraftRequest(TreeShape(depth + 1, depth, 1, lookup=depth))).on_host()
        chain = input_ids.new_tensor([_best_path(pool)], dtype=torch.long)
        return cast(torch.LongTensor, torch.cat([input_ids, chain], dim=1)), None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int, committed: Committed | None = None
    ) -> None:
        """Learn how many of the newest candidates were kept.

        Args:
            input_ids: `[b, s]` as in `get_candidates`.
            scores: `[b, n, v]` the target's logits, after the root and after each node.
            num_matches: candidates that were kept, in the row that kept most.
            committed: the new tokens, from our loop. Transformers' shows them when it asks for the next chain.
        """
        if committed is not None:
            self.observe(committed)

    def _features(self, outputs: Any, count: int) -> Tensor | None:
        """Take the features at the position before each of the last `count` tokens, `[1, t, F]`."""
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
        """Process observed tokens, if at least so many wait; a draft does so by itself."""
        return None

    def take_compile_seconds(self) -> float:
        """Take the seconds spent on compiling drafts since the last call."""
        return 0.0

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Draft for these rows only, from now on."""


def _best_path(pool: CandidatePool) -> list[int]:
    """Walk from the root to the likeliest of the deepest nodes that may be right; returns the tokens."""
    tokens, parents, scores = (part[0].tolist() for part in (pool.tokens, pool.parents, pool.scores))
    levels = pool.levels.tolist()
    possible = [place for place, score in enumerate(scores) if score > -torch.inf]
    node = max(possible, key=lambda place: (levels[place], scores[place]), default=-1)
    path = list[int]()
    while node >= 0:
        path.insert(0, tokens[node])
        node = parents[node]
    return path
