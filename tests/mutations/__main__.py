"""Plants the bugs, one at a time, each in a process of its own, and tells which of them the tests notice.

    python -m tests.mutations            # all; or the numbers of some: python -m tests.mutations 3 7

No file is changed. Exit status: 0 when every bug is caught, otherwise 1.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .bugs import MUTATIONS


ROOT = Path(__file__).parents[2]
MAX_SECONDS = 600  # for each of the tests: a bug may also make a loop endless


def failure(number: int, *tests: str) -> str | None:
    """The first test that fails with a bug, or `None`; number 0 is no bug.

    Raises:
        RuntimeError: the tests could not be run, or the bug's own code fails.
    """
    command = [sys.executable, "-m", "tests.mutations.planted", str(number), *tests]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "RESPS_HYPOTHESIS_PROFILE": "mutations",
    }
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS * len(tests),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{', '.join(tests)} (endless)"
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        raise RuntimeError(f"{' '.join(command)} could not run:\n{done.stdout}{done.stderr}")
    return failed[0] if failed else None


def is_caught(number: int) -> bool:
    """Run one bug's tests, print one line."""
    mutation, started = MUTATIONS[number - 1], time.perf_counter()
    failed = failure(number, mutation.tests)
    found = f"caught by {failed.rpartition('/')[2]}" if failed else "SURVIVED"
    print(f"{number:2} {mutation.symbol}: {mutation.bug}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
    return failed is not None


def main() -> int:
    """All bugs, after the tests have passed without any."""
    parser = argparse.ArgumentParser("tests.mutations", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, default=range(1, len(MUTATIONS) + 1), help="all by default")
    numbers = parser.parse_args().numbers
    if failed := failure(0, *sorted({MUTATIONS[number - 1].tests for number in numbers})):
        print(f"{failed} fails without any bug: nothing can be learned")
        return 1
    caught = sum(map(is_caught, numbers))
    print(f"{caught} of {len(numbers)} caught")
    return 0 if caught == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
