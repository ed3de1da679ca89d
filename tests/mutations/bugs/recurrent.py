"""Bugs in what recurrent layers keep of a tree."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from transformers_resps.verifying.cache import copied_rows, write_back

from ..planting import Function, Mutation


def one_mixer_stays_behind(keep: Function) -> Function:
    def wrong(self: Any, path: Tensor, paths: list[list[int]]) -> None:
        layer, rows = self._cache.layers[max(self._mixers)], range(len(paths))
        before = copied_rows(layer, torch.tensor(rows))
        keep(self, path, paths)
        write_back(layer, before, zip(rows, rows, strict=True))

    return wrong


def forget_the_last_node(read_again: Function) -> Function:
    def wrong(self: Any, reading: Any, path: Tensor, counts: list[int]) -> None:
        read_again(self, reading, path, [max(count - 1, 1) for count in counts])

    return wrong


def take_the_first_leaf(full_path: Function) -> Function:
    def wrong(self: Any, row: int, nodes: list[int]) -> int | None:
        return None if full_path(self, row, nodes) is None else row * self.path_count

    return wrong


def start_from_the_first_row(copied: Function) -> Function:
    def wrong(layer: Any, rows: Tensor) -> Any:
        return copied(layer, rows * 0)

    return wrong


def keep_the_limit(of_tree: Function) -> Function:
    def wrong(self: Any, depth: int) -> Any:
        return nullcontext()

    return wrong


PATHS = "tests/verifying/test_hybrids.py::test_each_path_of_a_tree_is_read_as_if_it_were_the_text"
STATES = "tests/verifying/test_hybrids.py::test_the_states_go_on_from_the_kept_path_alone"
ROWS = "tests/verifying/test_hybrids.py::test_rows_of_a_padded_batch_have_trees_of_their_own"
KIT = "tests/testing/test_lossless_hybrids.py::test_a_hybrid_target_is_lossless"

MUTATIONS = (
    Mutation("one mixer keeps its old state", "verifying.hybrids:RecurrentMixers.keep", one_mixer_stays_behind, KIT),
    Mutation(
        "states lack the last node",
        "verifying.hybrids:RecurrentMixers._read_again",
        forget_the_last_node,
        STATES,
    ),
    Mutation("states are the first leaf's", "verifying.hybrids:TreePaths.full_path", take_the_first_leaf, STATES),
    Mutation("paths start from the first row", "verifying.cache:copied_rows", start_from_the_first_row, ROWS),
    Mutation("time steps of trees are cut", "verifying.hybrids:ScanSettings.of_tree", keep_the_limit, PATHS),
)
