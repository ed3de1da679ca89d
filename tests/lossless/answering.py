"""Both ways of answering, and trees so wide that most picks are drafted."""

from typing import Any

from transformers import (
    set_seed,
)

from tests.targets import VOCABULARY
from transformers_resps import DraftHead, FixedPolicy, TreeShape


WIDE = TreeShape(40, 3, VOCABULARY)  # so wide that most picks are drafted
SAMPLING = {"do_sample": True, "temperature": 1.3}


def both(target: Any, head: DraftHead, inputs: Any, shape: TreeShape = WIDE, seed: int = 0, **options: Any) -> Any:
    """The output of the same call, plain and with the head."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    outputs = []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(shape)}):
        set_seed(seed)
        call = {"max_new_tokens": 24, "return_dict_in_generate": True, **options}
        made = {name: value() if isinstance(value, type) else value for name, value in call.items()}
        outputs.append(target.generate(**inputs, **made, **extra))
    return outputs
