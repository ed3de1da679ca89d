"""What a step verifies, with a drafter that is no head: by hand."""

import torch

from transformers_resps import Policy, TreeShape
from transformers_resps.decoding.proposal import Proposer
from transformers_resps.drafting.drafter import Committed, Drafter, DraftRequest
from transformers_resps.drafting.prompt_lookup import LookupDrafter
from transformers_resps.policies.base import Observation
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.tree import CandidatePool, Pricing


class OneChild(Drafter):
    """Proposes the tokens 7 and 8 below every root, and 9 below the first of them."""

    proposable_tokens = 2

    def __init__(self) -> None:
        self.read_after: list[int] = []

    def observe(self, committed: Committed) -> None:
        tokens, features, *_ = committed
        assert features is not None and features.shape[1] == tokens.shape[1] - 1, "those of a prompt"

    def keep_rows(self, rows: list[int]) -> None:
        raise AssertionError("there is one row")

    def draft(self, input_ids: torch.Tensor, request: DraftRequest) -> CandidatePool:
        tokens, parents = torch.tensor([[7, 8, 9]]), torch.tensor([[-1, -1, 0]])
        return CandidatePool(tokens, parents, torch.tensor([[-0.1, -2.0, -0.2]]), torch.tensor([1, 1, 2]))

    def read(self, at_least: int = 1) -> None:
        self.read_after.append(at_least)


class OneRow:
    in_lockstep = True
    row_weights = (1.0,)
    input_ids = torch.zeros(1, 0)


def proposer_of(policy: Policy, drafter: Drafter | None, tokens: list[int]) -> Proposer:
    """After it has observed a prompt."""
    made = Proposer(policy, drafter, OneRow(), LookupDrafter([0]))
    committed = Committed(torch.tensor([tokens]), torch.arange(len(tokens) - 1)[None, :, None])
    made.update(committed)
    return made


class Sized(FixedPolicy):
    """Verifies three nodes of any pool; keeps what it saw."""

    weighs_lookup = True
    seen: Observation
    odds: list[float]

    def choose(self, observation: Observation) -> TreeShape:
        self.seen, self.odds = observation, observation.prefix_accept_probs()
        return super().choose(observation)

    def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
        return 3


def test_the_best_nodes_of_the_pool_and_what_followed_before_make_one_tree() -> None:
    policy = Sized(TreeShape(8, 2, 2, lookup=2))
    proposer = proposer_of(policy, OneChild(), [1, 2, 7, 5, 1, 2])
    proposer.read_prompt()
    proposal = proposer.propose(torch.tensor([2]), step=4, context_length=6, room=10, pricing=Pricing())
    assert proposal.tree.tokens.tolist() == [[2, 7, 9, 5]]
    assert proposal.tree.parents.tolist() == [[0, 0, 1, 1]]
    assert (proposal.candidates, proposal.looked_up) == (3, 2)
    assert policy.seen.features is not None and policy.seen.features.tolist() == [[4]], "the newest ones"
    assert (policy.seen.step, policy.seen.context_length, policy.seen.room) == (4, 6, 10)
    assert len(policy.odds) > 2
    assert policy.seen.shared() == [[0]] and len(policy.seen.prefix_accept_probs()) == 1, "5 is not in the pool"


def test_what_both_propose_is_verified_even_where_the_drafters_own_tree_is_cut_to_nothing() -> None:
    class Cut(Sized):
        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
            self.least_lookup_prob = 1.0  # nothing that is looked up alone
            return 1

    policy = Cut(TreeShape(8, 2, 2, lookup=2))
    proposal = proposer_of(policy, OneChild(), [1, 2, 7, 5, 1, 2]).propose(
        torch.tensor([2]), step=4, context_length=6, room=10, pricing=Pricing()
    )
    assert policy.seen.shared() == [[0]]
    assert proposal.tree.tokens.tolist() == [[2, 7]], "a guard may allow looked-up nodes alone: 7, not 5"


def test_a_shape_is_cut_to_the_room_and_a_plain_step_asks_no_drafter() -> None:
    policy, drafter = Sized(TreeShape(8, 2, 2)), OneChild()
    proposal = proposer_of(policy, drafter, [1, 2]).propose(torch.tensor([2]), 0, 2, room=1, pricing=Pricing())
    assert proposal.shape.depth == 0 and proposal.pool is None
    assert proposal.tree.tokens.tolist() == [[2]]
    assert drafter.read_after and min(drafter.read_after) > 1, "it may let a few positions wait"


def test_without_a_drafter_lookup_alone_proposes() -> None:
    policy = FixedPolicy(TreeShape(8, 2, 2, lookup=2))
    proposal = proposer_of(policy, None, [1, 2, 7, 5, 1, 2]).propose(
        torch.tensor([2]), 0, 6, room=10, pricing=Pricing()
    )
    assert proposal.shape == TreeShape(1, 0, 1, 2)
    assert proposal.tree.tokens.tolist() == [[2, 7, 5]]
