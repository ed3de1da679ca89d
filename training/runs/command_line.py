"""The command line and the YAML recipe of a training script, as TRL reads them."""

import sys
from typing import Any

from transformers_resps.compat import check_extra


def parse(*kinds: Any) -> tuple[Any, ...]:
    """Parse one object of each dataclass in `kinds`; exits with one line where the extra `train` is not installed.

    Raises:
        ValueError: an option is out of its range.
    """
    try:
        check_extra("train")
    except ValueError as error:
        sys.exit(str(error))
    from trl import TrlParser  # type: ignore[attr-defined]  # TRL loads its names lazily

    return tuple(TrlParser(kinds).parse_args_and_config())  # type: ignore[no-untyped-call]
