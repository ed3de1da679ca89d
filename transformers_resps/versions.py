"""What moved between the releases of Transformers that we support. Each line says when it can go."""

from typing import Any

import transformers
from packaging.version import Version


_INSTALLED = Version(transformers.__version__)

# `past_key_values` became `cache` in 5.24. Goes when 5.24 is the lowest release we support.
CACHE_KEYWORD = "cache" if Version("5.24") <= _INSTALLED else "past_key_values"


def hidden_states_request(layers: list[int]) -> list[int] | bool:
    """The value of `output_hidden_states` that keeps at least `layers`.

    Releases before 5.23 can only keep all of them. Goes when 5.23 is the lowest release we support.
    """
    return layers if Version("5.23") <= _INSTALLED else True


def cache_of(outputs: Any) -> Any:
    """The cache of a model's outputs."""
    return getattr(outputs, CACHE_KEYWORD)
