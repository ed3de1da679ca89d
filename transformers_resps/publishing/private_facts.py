"""What a published text must not say of the machine and the person behind it. Knows texts alone."""

import getpass
import re
from collections.abc import Iterator


_PATH = re.compile(r"(?<![\w.:/~-])(?:~|/[\w.@-]+)/[\w.@/-]+|\b[A-Za-z]:\\[\w\\.-]+|\bfile:/+\S+")
_UNTELLING_USERS = {"root"}


def private_facts(name: str, text: str) -> Iterator[str]:
    """Paths and names of the machine it was made on, each with what is needed and what to do.

    Args:
        name: of the file that holds it.
        text: its content.
    """
    if paths := sorted(set(_PATH.findall(text))):
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        yield f"{name} names {shown}: paths of your machine. Names relative to it are needed. Mend the file."
    user = _user()
    if user is not None and re.search(rf"(?<![\w-]){re.escape(user)}(?![\w/-])", text):
        yield f"{name} holds your login name {user!r}. Nothing private may be published. Mend the file."


def _user() -> str | None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return None
    return None if user in _UNTELLING_USERS else user
