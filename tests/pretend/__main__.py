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
blocks = {
    name: {"drafted": steps.count_block(name), "captured": steps.count_block(name, captures=True)}
    for name in ([] if sys.argv[1:] else steps.BLOCKS)
}
found = {"counts": counts, "texts": texts, "hybrids": hybrids, "layer": layer, "blocks": blocks}
print(json.dumps(found, indent=None if texts else 1))
