"""Loads the policies that a command names."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..heads import DraftHead, pair_identity
from ..policies import AutoPolicy, FixedPolicy, Policy, ReSpSPolicy
from ..tree import TreeShape
from .names import distinct_names
from .options import shape


def read_policy(text: str | None, head: DraftHead | None) -> Policy | str:
    """Return a fixed tree from its numbers, a saved policy from its folder or Hub id, or "auto" as it is.

    Without a text it is the head's default tree, and without a head "auto".

    Raises:
        ValueError: the text names nothing.
    """
    if text is None and head is not None:
        return FixedPolicy(head.default_shape)
    if text is None or text == "auto":
        return "auto"
    tree = named_tree(text)
    return AutoPolicy.from_pretrained(text) if tree is None else FixedPolicy(tree)


def load_policies(names: Sequence[str], target: Any, head: DraftHead) -> dict[str, Policy | str]:
    """Load the benchmark's policies: name in the table -> policy.

    Raises:
        ValueError: there is no such policy, one is named twice, or one was trained for another target or head.
    """
    found: dict[str, Policy | str] = {}
    places: set[str | Path] = set()
    for source, called in zip(names, distinct_names(names), strict=True):
        if named_tree(source) is not None:
            raise ValueError(
                f"`--policy {source}` is a tree, but `--policy` takes 'auto', folders or Hub ids. Pass `--shapes "
                f"{source}`."
            )
        policy = read_policy(source, head)
        if isinstance(policy, Policy) and policy.has_identity:
            policy.check_identity(**pair_identity(target, head))
        place = Path(source).resolve() if Path(source).is_dir() else source
        if place in places:
            raise ValueError(f"`--policy` names {source} twice. Pass each policy once.")
        places.add(place)
        found[policy_name(called, policy)] = policy
    return found


def policy_name(called: str, policy: Policy | str) -> str:
    """Return `auto`, `Re-SpS NAME` for a learned policy that `distinct_names` calls `NAME`, or `policy NAME`."""
    if isinstance(policy, str):
        return policy
    if isinstance(policy, ReSpSPolicy):
        return f"Re-SpS {called}"
    return called if called.startswith("policy") else f"policy {called}"


def named_tree(text: str) -> TreeShape | None:
    """Read the shape that `8,4,2` names; `None` for what has no commas or is a folder.

    Raises:
        ValueError: it has commas, but is no shape.
    """
    if "," not in text or Path(text).exists():
        return None
    try:
        return shape(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error
