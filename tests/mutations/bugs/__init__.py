"""The planted bugs, by room: each takes the right function, then its arguments."""

from ..planting import Mutation
from . import decoding, drafting, invariant, recurrent, target, tree


_ROOMS = tree, drafting, decoding, target, recurrent, invariant
MUTATIONS = [value for room in _ROOMS for value in vars(room).values() if isinstance(value, Mutation)]
