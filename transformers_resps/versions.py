"""What moved between the releases of Transformers that we support. Each line says when it can go."""

import transformers
from packaging.version import Version


_INSTALLED = Version(transformers.__version__)

# `past_key_values` became `cache` in 5.24. Goes when 5.24 is the lowest release we support.
CACHE_KEYWORD = "cache" if Version("5.24") <= _INSTALLED else "past_key_values"

# Of some layers as `output_hidden_states` older releases leave out what enters the first, and count from there. Goes
# when 5.23 is the lowest release we support.
SELECTS_HIDDEN_STATES = Version("5.23") <= _INSTALLED
