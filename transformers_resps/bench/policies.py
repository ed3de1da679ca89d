"""Loads the policies that a command names."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..head import DraftHead, pair_identity
from ..policy import AutoPolicy, FixedPolicy, Policy, ReSpSPolicy
from ..tree import TreeShape
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
        ValueError: there is no such policy, two have one name, or one was trained for another target or head.
    """
    found: dict[str, Policy | str] = {}
    for source in names:
        if named_tree(source) is not None:
            raise ValueError(
                f"`--policy {source}` is a tree, but `--policy` takes 'auto', folders or Hub ids. Pass `--shapes "
                f"{source}`."
            )
        policy = read_policy(source, head)
        if isinstance(policy, Policy) and policy.has_identity:
            policy.check_identity(**pair_identity(target, head))
        name = policy_name(source, policy)
        if name in found:
            raise ValueError(
                f"Two policies have the name {name!r}. Pass each policy once, and give their folders different names."
            )
        found[name] = policy
    return found


def policy_name(source: str, policy: Policy | str) -> str:
    """Return `auto`, `Re-SpS NAME` for a learned policy of a folder or repository `NAME`, or `policy NAME`."""
    if isinstance(policy, str):
        return policy
    last = source.rstrip("/").rpartition("/")[2]
    return f"Re-SpS {last}" if isinstance(policy, ReSpSPolicy) else f"policy {last}"


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
