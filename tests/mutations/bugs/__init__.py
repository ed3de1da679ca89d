"""The planted bugs, by room: each function takes the right one and returns the wrong one."""

from . import decoding, recurrent, target, tree


MUTATIONS = (*tree.MUTATIONS, *decoding.MUTATIONS, *target.MUTATIONS, *recurrent.MUTATIONS)
