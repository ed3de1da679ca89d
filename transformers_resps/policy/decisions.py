"""Ask a policy, and refuse a decision that no step can follow."""

from torch import Tensor

from ..tree import TreeShape
from .policy import Level, Observation, Policy


# What a step may cost in memory. Published trees verify 60 nodes of 710 candidates.
MAX_NODES = 4096
MAX_CANDIDATES = 2**20


def choose_shape(policy: Policy, observation: Observation, proposable_tokens: int) -> TreeShape:
    """The shape that `policy` chooses, no deeper than there is room.

    Args:
        policy: chooses.
        observation: what it sees.
        proposable_tokens: number of tokens that the head can propose; 0 without a head.

    Raises:
        ValueError: the choice is no shape, or is larger than `MAX_NODES` and `MAX_CANDIDATES` allow.
    """
    shape = ask_shape(policy, observation).within(observation.room - 1)
    if proposable_tokens == 0:
        return TreeShape(1, 0, 1, shape.lookup)
    width = min(shape.top_k, shape.total_tokens - 1, proposable_tokens)
    candidates = width + (shape.depth - 1) * width**2 if shape.asks_head else 0
    if candidates > MAX_CANDIDATES or min(shape.total_tokens, candidates + 1) > MAX_NODES:
        raise ValueError(
            f"{policy!r} chose {shape} with up to {candidates} candidates, but a step is limited to {MAX_CANDIDATES} "
            f"candidates and {MAX_NODES} nodes. Return a smaller shape from `choose`; published trees have 60 nodes."
        )
    return shape


def ask_shape(policy: Policy, observation: Observation) -> TreeShape:
    """The shape that `policy` chooses, as it is.

    Raises:
        ValueError: the choice is no shape.
    """
    shape = policy.choose(observation)
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"{policy!r} returned {shape!r} from `choose`. Return a `TreeShape`; `TreeShape.plain()` drafts nothing."
        )
    return shape


def wants_level(policy: Policy, level: Level) -> bool:
    """Whether `policy` has another level drafted.

    Raises:
        ValueError: its answer is neither true nor false.
    """
    answer = policy.grow(level)
    try:
        return bool(answer)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several values
        raise ValueError(f"{policy!r} returned {answer!r} from `grow`. Return True or False.") from error


def count_nodes(policy: Policy, scores: Tensor, levels: Tensor) -> int:
    """How many nodes `policy` verifies of a pool, see `Policy.size`; below 1 counts as the root alone.

    Raises:
        ValueError: its answer is no number.
    """
    answer = policy.size(scores, levels)
    try:
        return int(answer)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"{policy!r} returned {answer!r} from `size`. Return an integer; 1 verifies the root alone."
        ) from error
