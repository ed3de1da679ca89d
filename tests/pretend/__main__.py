"""Print counts and texts as JSON: `python -m tests.pretend ["8/4/2" ...]` counts the steps of these calls only.

A process of its own, because PyTorch would take the pretend device for this machine's accelerator ever after.
"""

import dataclasses
import json
import sys

from transformers_resps.compat import HAS_RECURRENT_STATES

from . import contract, mixers, steps


counts = {name: dataclasses.asdict(steps.count(name)) for name in sys.argv[1:] or steps.CALLS}
texts = {name: contract.texts(name) for name in ([] if sys.argv[1:] else contract.CALLS)}
layer = 0 if sys.argv[1:] else steps.count_layer()
names = [] if sys.argv[1:] or not HAS_RECURRENT_STATES else mixers.TARGETS
hybrids = {name: mixers.asked(name) for name in names}
print(json.dumps({"counts": counts, "texts": texts, "hybrids": hybrids, "layer": layer}, indent=None if texts else 1))
