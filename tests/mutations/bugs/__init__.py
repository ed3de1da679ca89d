"""The planted bugs, by room: each function takes the right one and returns the wrong one."""

from . import decoding, drafting, invariant, recurrent, target, tree


MUTATIONS = (
    *tree.MUTATIONS,
    *drafting.MUTATIONS,
    *decoding.MUTATIONS,
    *target.MUTATIONS,
    *recurrent.MUTATIONS,
    *invariant.MUTATIONS,
)
