"""Make the tree of a step: the policy chooses the tree's size; drafter and lookup propose the tree's nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..drafting.drafter import Committed, Drafter, DraftRequest
from ..drafting.engine import MAX_UNREAD
from ..drafting.prompt_lookup import LookupDrafter
from ..policies.base import Level, Observation, Policy, choose_shape, count_nodes, mean_odds, wants_level
from ..telemetry import Proposed
from ..tree import DRAFTED, CandidatePool, DraftTree, Pricing, TreeShape


class DecodedRows(Protocol):
    """The properties of decoded rows that a `Proposer` reads; a `Batch` has them, and so does a replayed text."""

    @property
    def in_lockstep(self) -> bool: ...

    @property
    def row_weights(self) -> Sequence[float]: ...

    @property
    def input_ids(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """The tree that a step verifies, and how it was drafted."""

    shape: TreeShape  # the policy's choice, cut to the tokens that the text may still gain
    tree: DraftTree
    pool: CandidatePool | None = None  # the drafter's candidates; None if it did not draft
    looked_up: int = 0  # nodes that lookup found, in the row with most

    @property
    def candidates(self) -> int:
        """Number of nodes in each row's pool."""
        return 0 if self.pool is None else self.pool.tokens.shape[1]

    def proposed(self, paths: Sequence[Sequence[int]], gained: Sequence[bool]) -> Proposed:
        """Count the drafted nodes of `paths` (root first) by their source, in rows where `gained` is true."""
        accepted = [(row, node) for row, path in enumerate(paths) if gained[row] for node in path[1:]]
        flags = self.tree.proposers
        return Proposed.of([flags[row][node] if flags else DRAFTED for row, node in accepted])


class Proposer:
    """Makes each step's tree: the policy decides its size; drafter (may be `None`) and lookup propose its nodes."""

    def __init__(self, policy: Policy, drafter: Drafter | None, rows: DecodedRows, lookup: LookupDrafter) -> None:
        self._policy, self._drafter, self._rows, self._lookup = policy, drafter, rows, lookup
        self._newest_features: Tensor | None = None  # [b, F]

    def update(self, committed: Committed) -> None:
        """Give newly committed tokens to drafter and lookup."""
        if self._drafter is not None:
            self._drafter.observe(committed)
        self._lookup.observe(committed)
        self._newest_features = None if committed.features is None else committed.features[:, -1]

    def take_compile_seconds(self) -> float:
        """Return the seconds spent on compiling drafting code since the last call."""
        return 0.0 if self._drafter is None else self._drafter.take_compile_seconds()

    def read_prompt(self) -> None:
        if self._policy.uses_lookup:
            self._lookup.read()
        if self._drafter is not None:
            self._drafter.read()

    def propose(
        self, root: Tensor, step: int, context_length: int, room: int, pricing: Pricing, prompt_seconds: float = 0.0
    ) -> Proposal:
        """Draft the tree below the newest tokens `root` `[b]`, which are on the target's device.

        For the other arguments see the attributes of `Observation`. Raises a `ValueError` if the policy returns an
        impossible shape or number of nodes.
        """
        is_ragged = pricing.packs_rows and not self._rows.in_lockstep
        observation = Observation(
            self._newest_features,
            context_length,
            step,
            room,
            self._prefix_accept_probs,
            prompt_seconds,
            self._rows.row_weights,
            pricing,
            can_draft=self._drafter is not None,
            drafts_at_once=self._drafter is not None and self._drafter.drafts_at_once,
            most_levels=None if self._drafter is None else self._drafter.most_levels,
            row_count=len(root),
            device_type=root.device.type,
            shared=lambda: self._lookup.shared,
            row_accept_probs=(lambda: self._lookup.odds) if is_ragged else None,
        )
        proposable = 0 if self._drafter is None else self._drafter.proposable_tokens
        shape = choose_shape(self._policy, observation, proposable)
        pool, looked_up = self._draft(root, shape), 0
        if pool is None and not shape.lookup:
            return Proposal(shape, DraftTree.root_only(root))
        if pool is not None and (shape.lookup or self._policy.needs_drafted_match):
            pool = pool.on_host()  # copy once: the code below reads it several times
        pool = None if pool is None else pool.discounted(self._policy.discounts)
        if pool is not None and shape.lookup and self._policy.weighs_lookup:
            pool = self._lookup.weigh_beside(pool, shape.lookup)
        tree = self._tree(root, pool, shape.total_tokens, is_ragged=is_ragged)
        if shape.lookup:
            found = self._lookup.branches(self._request(shape))
            looked_up = max(len(row.tokens) for row in found)
            tree = tree.with_branches(found) if looked_up else tree
        return Proposal(shape, tree if tree.tokens.device == root.device else tree.below(root), pool, looked_up)

    def _tree(self, root: Tensor, pool: CandidatePool | None, total_tokens: int, *, is_ragged: bool) -> DraftTree:
        """Make a tree of the root and the pool's best nodes, at most `total_tokens`; without a pool, a root on CPU."""
        device = torch.device("cpu") if pool is None else pool.tokens.device
        # zeros replace a root on another device, until `below` sets it
        known = root if device == root.device else torch.zeros(root.shape, dtype=root.dtype, device=device)
        if pool is not None:
            most = min(total_tokens, 1 + pool.tokens.shape[1])
            sizes = [min(max(count, 1), most) for count in count_nodes(self._policy, pool.scores, pool.levels)]
            total_tokens = max(sizes)
            built = None if self._drafter is None or self._policy.discounts else self._drafter.built_tree
            if built is not None and built.node_count == total_tokens and built.tokens.device == device:
                return built
            if total_tokens > 1:
                own = sizes if is_ragged and min(sizes) < total_tokens else ()
                return DraftTree.from_pool(known, pool, total_tokens, sizes=own)
        return DraftTree.root_only(known)

    def keep_rows(self, rows: list[int]) -> None:
        self._lookup.keep_rows(rows)
        if self._newest_features is not None:
            self._newest_features = torch.stack([self._newest_features[row] for row in rows])  # no copy to the device
        if self._drafter is not None:
            self._drafter.keep_rows(rows)

    def _request(self, shape: TreeShape) -> DraftRequest:
        policy = self._policy

        def goes_on(depth: int, scores: Tensor) -> bool:
            return wants_level(policy, Level(depth, scores))

        return DraftRequest(shape, goes_on if policy.grows else None, policy.least_lookup_prob)

    def _draft(self, root: Tensor, shape: TreeShape) -> CandidatePool | None:
        if self._drafter is None:
            return None
        if shape.asks_head:
            text = self._rows.input_ids if self._drafter.reads_text else root[:, None]  # joining the text is slow
            return self._drafter.draft(text, self._request(shape))
        self._drafter.read(at_least=MAX_UNREAD)
        return None

    def _prefix_accept_probs(self) -> list[float]:
        rows = self._lookup.odds
        if self._rows.in_lockstep:
            return min(rows, key=lambda odds: odds[:1])
        return mean_odds(rows, self._rows.row_weights)
