"""Bugs in what sources of levels read and see."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..planting import Function, bug


WINDOWS = "tests/drafting/test_model_drafter.py"
PIECES = "tests/drafting/test_depths.py"
MEMORIES = "tests/drafting/test_suffix_memory.py"
KEYS = "tests/verifying/test_verifier.py::test_it_hands_out_the_keys_of_kept_tokens_that_a_rows_next_token_sees"


@bug("a depth reads its own token", "drafting.passes:one_later", PIECES)
def paired_with_its_own_state(one_later: Function, states: Tensor, where: int | Tensor) -> Tensor:
    return states[:, 1:]


@bug("all nodes of a depth see each other", "drafting.passes:_Depths.visible", PIECES)
def siblings_see_each_other(visible: Function, levels: Any) -> Tensor:
    return torch.ones_like(visible(levels))


@bug("a depth sees entries it never had", "drafting.text:Prefix.seen_at", PIECES)
def a_depth_has_all_entries(seen_at: Function, self: Any, depth: int) -> Tensor | None:
    found = seen_at(self, depth)
    return None if found is None else torch.ones_like(found)


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


@bug("broken promises are forgotten", "drafting.continuations:Continuations.judge_sum", MEMORIES)
def broken_promises_are_forgotten(judge_sum: Function, self: Any, tokens: Any) -> None:
    return None
