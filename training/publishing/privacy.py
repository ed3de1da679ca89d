"""Find paths and login names in files that are to be published."""

import getpass
import re
from collections.abc import Iterator


_PATH = re.compile(r"(?<![\w.:/~-])(?:~|/[\w.@-]+)/[\w.@/-]+|\b[A-Za-z]:\\[\w\\.-]+|\bfile:/+\S+")
_UNTELLING_USERS = {"root"}


def private_facts(name: str, text: str) -> Iterator[str]:
    """Yield a message for paths of this machine in `text`, and one for the user's login name.

    Args:
        name: of the file.
        text: its content.
    """
    if paths := sorted(set(_PATH.findall(text))):
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        yield f"{name} contains paths of your machine: {shown}. Use relative paths."
    user = _user()
    if user is not None and re.search(rf"(?<![\w-]){re.escape(user)}(?![\w/-])", text):
        yield f"{name} contains your login name {user!r}. Remove it."


def _user() -> str | None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in some containers
        return None
    return None if user in _UNTELLING_USERS else user
