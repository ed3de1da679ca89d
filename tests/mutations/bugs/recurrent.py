"""Bugs in what recurrent layers keep of a tree."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..planting import Function, Mutation


def one_mixer_stays_behind(keep: Function) -> Function:
    def wrong(self: Any, path: Tensor) -> None:
        last = max(self._mixers)
        states = self._cache.get_conv_state(last), self._cache.get_recurrent_state(last)
        before = [None if state is None else state.clone() for state in states]
        keep(self, path)
        for state, old in zip(states, before, strict=True):
            if state is not None:
                state.copy_(old)

    return wrong


def forget_the_last_node(advance: Function) -> Function:
    def wrong(self: Any, path: Tensor) -> None:
        advance(self, path[:, : max(path.shape[1] - 1, 1)])

    return wrong


def take_the_first_path(beginning_with: Function) -> Function:
    def wrong(self: Any, path: Tensor) -> Tensor | None:
        chosen = beginning_with(self, path)
        return None if chosen is None else chosen // self.path_count * self.path_count

    return wrong


def keep_what_is_repeated(of_kept: Function) -> Function:
    def wrong(self: Any, is_kept: Tensor) -> Any:
        return self

    return wrong


def start_from_the_first_row(from_rows: Function) -> Function:
    def wrong(self: Any, states: Tensor) -> Any:
        return from_rows(self, states)[:1].expand(len(self.rows), *states.shape[1:])

    return wrong


def keep_the_limit(of_tree: Function) -> Function:
    def wrong(self: Any, depth: int) -> Any:
        return nullcontext()

    return wrong


def forget_the_last_kept(advance: Function) -> Function:
    def wrong(self: Any, tensors: Any, noted: Any, path: Tensor) -> None:
        advance(self, tensors, noted, path[:, : max(path.shape[1] - 1, 1)])

    return wrong


def see_all_before(of_tree: Function) -> Function:
    def wrong(self: Any, state: Tensor, ancestors: Tensor) -> Any:
        return of_tree(self, state, ancestors.new_ones(ancestors.shape).tril())

    return wrong


PATHS = "tests/verifying/test_hybrids.py::test_each_path_of_a_tree_is_read_as_if_it_were_the_text"
STATES = "tests/verifying/test_hybrids.py::test_the_states_go_on_from_the_kept_path_alone"
ROWS = "tests/verifying/test_hybrids.py::test_rows_of_a_padded_batch_have_trees_of_their_own"
KIT = "tests/testing/test_lossless_hybrids.py::test_a_hybrid_target_is_lossless"

MUTATIONS = (
    Mutation("one mixer keeps its old state", "verifying.hybrids:RecurrentMixers.keep", one_mixer_stays_behind, KIT),
    Mutation("states lack the last node", "verifying.hybrids:_Reading.advance", forget_the_last_node, STATES),
    Mutation("states are the first path's", "verifying.hybrids:TreePaths.beginning_with", take_the_first_path, STATES),
    Mutation("a row's last node counts again", "verifying.hybrids:_Steps.of_kept", keep_what_is_repeated, ROWS),
    Mutation(
        "paths start from the first row", "verifying.hybrids:TreePaths.from_rows", start_from_the_first_row, ROWS
    ),
    Mutation("a whole tree's last node is lost", "verifying.hybrids:StateKinds.advance", forget_the_last_kept, STATES),
    Mutation("a whole tree is read as a chain", "verifying.hybrids:_Steps.of_tree", see_all_before, PATHS),
    Mutation("time steps of trees are cut", "verifying.hybrids:ScanSettings.of_tree", keep_the_limit, PATHS),
)
