"""Draft trees on a stock model, with the installed package transformers-resps doing all of the work.

model.generate(**inputs, custom_generate=REPO_ID, trust_remote_code=True, assistant_model=head, policy=policy)
"""

from typing import Any

from transformers_resps import ReSpSGenerationMixin, attach, detach
from transformers_resps.policy import PolicyCache


def generate(model: Any, **arguments: Any) -> Any:
    """As `generate` of an attached model; one that was not attached keeps nothing but what "auto" has learned."""
    was_attached = isinstance(model, ReSpSGenerationMixin)
    try:
        return attach(model).generate(**arguments)
    finally:
        if not was_attached:
            with PolicyCache.set_aside(model):
                detach(model)
