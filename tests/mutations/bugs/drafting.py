"""Bugs in what sources of levels read and see."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..planting import Function, bug


WINDOWS = "tests/drafting/test_level_drafter.py"
PIECES = "tests/drafting/test_depths.py"
KEYS = "tests/verifying/test_verifier.py::test_it_hands_out_the_keys_of_kept_tokens_that_a_rows_next_token_sees"


@bug("a depth reads its own token", "drafting.level_drafter:LevelDrafter._one_later", PIECES)
def paired_with_its_own_state(one_later: Function, states: Tensor, slots: Tensor | None) -> Tensor:
    return states[:, 1:]


@bug("all nodes of a depth see each other", "drafting.levels:DepthForward._mask", PIECES)
def siblings_see_each_other(mask: Function, self: Any, nodes: Any, level: int) -> Tensor:
    return torch.ones_like(mask(self, nodes, level))


@bug("a depth sees entries it never had", "drafting.level_drafter:LevelDrafter._from_depth", PIECES)
def a_depth_has_all_entries(from_depth: Function, depth: int, seen: Tensor) -> Tensor:
    return torch.ones_like(from_depth(depth, seen))


@bug("an assistant sees keys of other rows", "verifying.growing:TreeVerifier.target_entries", KEYS)
def rejected_keys_stay(target_entries: Function, self: Any) -> Any:
    found = target_entries(self)
    return replace(found, masks={kind: torch.zeros_like(mask) for kind, mask in found.masks.items()})


@bug("entries that no token sees stay", "drafting.cache:DraftCache.forget", WINDOWS)
def entries_stay(forget: Function, self: Any, count: Any, length: Any) -> None:
    """Nothing happens."""


@bug("padding stays where slots move", "verifying.rows:SlotMap.forget", WINDOWS)
def padding_stays(forget: Function, self: Any, count: int) -> None:
    padding = self._padding
    forget(self, count)
    self._padding = padding
