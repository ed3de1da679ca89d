"""Bugs in what sources of levels read and see."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..planting import Function, Mutation


def paired_with_its_own_state(one_later: Function) -> Function:
    def wrong(states: Tensor, slots: Tensor | None) -> Tensor:
        return states[:, 1:]

    return wrong


def siblings_see_each_other(mask: Function) -> Function:
    def wrong(self: Any, nodes: Any, level: int) -> Tensor:
        return torch.ones_like(mask(self, nodes, level))

    return wrong


def a_depth_has_all_entries(from_depth: Function) -> Function:
    def wrong(depth: int, seen: Tensor) -> Tensor:
        return torch.ones_like(from_depth(depth, seen))

    return wrong


def rejected_keys_stay(target_entries: Function) -> Function:
    def wrong(self: Any) -> Any:
        found = target_entries(self)
        return replace(found, masks={kind: torch.zeros_like(mask) for kind, mask in found.masks.items()})

    return wrong


def entries_stay(forget: Function) -> Function:
    return lambda self, count, length: None


def padding_stays(forget: Function) -> Function:
    def wrong(self: Any, count: int) -> None:
        padding = self._padding
        forget(self, count)
        self._padding = padding

    return wrong


WINDOWS = "tests/drafting/test_level_drafter.py"
PIECES = "tests/drafting/test_depths.py"
KEYS = "tests/verifying/test_verifier.py::test_it_hands_out_the_keys_of_kept_tokens_that_a_rows_next_token_sees"

MUTATIONS = (
    Mutation(
        "a depth reads its own token",
        "drafting.level_drafter:LevelDrafter._one_later",
        paired_with_its_own_state,
        PIECES,
    ),
    Mutation(
        "all nodes of a depth see each other", "drafting.levels:DepthForward._mask", siblings_see_each_other, PIECES
    ),
    Mutation(
        "a depth sees entries it never had",
        "drafting.level_drafter:LevelDrafter._from_depth",
        a_depth_has_all_entries,
        PIECES,
    ),
    Mutation(
        "an assistant sees keys of other rows",
        "verifying.growing:TreeVerifier.target_entries",
        rejected_keys_stay,
        KEYS,
    ),
    Mutation("entries that no token sees stay", "drafting.cache:DraftCache.forget", entries_stay, WINDOWS),
    Mutation("padding stays where slots move", "verifying.rows:SlotMap.forget", padding_stays, WINDOWS),
)
