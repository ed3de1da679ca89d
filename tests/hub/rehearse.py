r"""Rehearse a publication: run a command against a Hub on this machine, and list what it published there.

    python -m tests.hub.rehearse python training/publish.py FOLDER OWNER/NAME

Nothing leaves the machine, and no account is needed. The Hub is empty and is gone at the end, so a target must be a
folder. Exit status: the command's.
"""

import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from tests.hub.loopback_hub import TOKEN, LoopbackHub


def main(command: list[str]) -> int:
    """Run `command` with the environment of a user who is logged in to a Hub on loopback."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    hub = LoopbackHub()
    try:
        with TemporaryDirectory() as cache:
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            program = [sys.executable, *command[1:]] if command[0] == "python" else command
            done = subprocess.run(program, env=environment | {"HF_HUB_CACHE": cache}, check=False)
    finally:
        hub.close()
    published = {
        name: repository.files for name, repository in hub.repositories.items() if len(repository.commits) > 1
    }
    for repo_id, files in published.items():
        print(f"\n{repo_id}{' (private)' if hub.repositories[repo_id].private else ''} would hold:")
        for name, content in sorted(files.items()):
            print(f"{len(content):12,}  {name}")
    if not published:
        print("\nNothing was published.")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
