"""Runs tests in a process with a bug: `python -m tests.mutations.planted NUMBER TESTS`, with 0 for none."""

import sys
from pathlib import Path
from typing import Any

import pytest

from . import bugs


BROKEN = 70  # exit status: the bug's own code fails, which tells nothing about the tests


class Blame:
    """A test that fails in the code of a bug has not noticed the bug."""

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        """Called by pytest with what a test raised."""
        assert call.excinfo is not None
        if Path(bugs.__file__).parent in Path(call.excinfo.traceback[-1].path).parents:
            pytest.exit(f"the bug itself raised {call.excinfo.exconly()}", returncode=BROKEN)


def main(number: int, tests: list[str]) -> int:
    """Plant, then run pytest; returns its exit status."""
    if number:
        bugs.MUTATIONS[number - 1].plant()
    return pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests], plugins=[Blame()])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
