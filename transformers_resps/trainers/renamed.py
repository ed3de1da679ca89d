"""Name the new keyword to callers who know an old one."""

from collections.abc import Iterable, Mapping


def check_renamed(owner: str, given: Iterable[str], renamed: Mapping[str, str]) -> None:
    """Check that no keyword in `given` is one that `owner` had in an earlier release.

    Args:
        owner: the class that was called.
        given: keywords of the call.
        renamed: old keyword -> what to write instead.

    Raises:
        ValueError: names the first old keyword and the new one.
    """
    for name in given:
        if name in renamed:
            raise ValueError(f"`{owner}` has no `{name}`. Write {renamed[name]} instead.")
