"""Bugs in what recurrent layers keep of a tree."""

from typing import Any

import torch
from torch import Tensor

from ..planting import Function, bug


PATHS = "tests/verifying/test_hybrids.py::test_each_path_of_a_tree_is_read_as_if_it_were_the_text"
STATES = "tests/verifying/test_hybrids.py::test_the_states_go_on_from_the_kept_path_alone"
ROWS = "tests/verifying/test_hybrids.py::test_rows_of_a_padded_batch_have_trees_of_their_own"
KIT = "tests/testing/test_lossless_hybrids.py::test_a_hybrid_target_is_lossless"


@bug("one mixer keeps its old state", "verifying.hybrids:RecurrentMixers.keep", KIT)
def one_mixer_stays_behind(keep: Function, self: Any, path: Tensor) -> None:
    last = max(self._mixers)
    states = self._cache.get_conv_state(last), self._cache.get_recurrent_state(last)
    before = [None if state is None else state.clone() for state in states]
    keep(self, path)
    for state, old in zip(states, before, strict=True):
        if state is not None:
            state.copy_(old)


@bug("states lack the last node", "verifying.hybrids:StateKinds.advance", STATES)
def forget_the_last_node(advance: Function, self: Any, states: Any, noted: Any, path: Tensor) -> None:
    advance(self, states, noted, path[:, : max(path.shape[1] - 1, 1)])


@bug("a row's last node counts again", "verifying.hybrids:_Updates.advance", ROWS)
def keep_what_is_repeated(advance: Function, self: Any, states: Any, path: Tensor, is_kept: Tensor) -> None:
    advance(self, states, path, torch.ones_like(is_kept))


@bug("rows read the first row's state", "verifying.hybrids:WholeTree.state", ROWS)
def read_the_first_row(state: Function, self: Any, layer: int) -> Any:
    found = state(self, layer)
    return None if found is None else found[:1].expand_as(found)


@bug("a scan reads a tree as a chain", "verifying.hybrids:_between", PATHS)
def see_all_before(between: Function, decays: Tensor, ancestors: Tensor) -> Any:
    return between(decays, torch.ones_like(ancestors).tril())


@bug("a convolution reads a tree as a chain", "verifying.hybrids:WholeTree._windows", PATHS)
def convolve_what_comes_before(windows: Function, self: Any, kernel: int, size: int) -> Any:
    right = windows(self, kernel, size)
    ends = torch.arange(right.shape[1])[:, None] + size
    return (ends - torch.arange(kernel - 1, -1, -1)).expand_as(right)
