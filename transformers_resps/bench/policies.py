"""What a command's `--policy` names."""

import argparse
from pathlib import Path

from ..head import DraftHead
from ..policy import AutoPolicy, FixedPolicy, Policy
from ..tree import TreeShape
from .options import shape


def read_policy(text: str | None, head: DraftHead | None) -> Policy | str:
    """A fixed tree from its numbers, a saved policy from its folder or Hub id, or "auto" as it is.

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


def named_tree(text: str) -> TreeShape | None:
    """`8,4,2` -> total_tokens, depth, top_k; `None` for what has no commas or is a folder.

    Raises:
        ValueError: it has commas, but is no shape.
    """
    if "," not in text or Path(text).exists():
        return None
    try:
        return shape(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error
