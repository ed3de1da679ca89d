"""Draft trees on a stock model, with the installed package transformers-resps doing all of the work.

model.generate(**inputs, custom_generate=REPO_ID, trust_remote_code=True, assistant_model=head, policy=policy)
"""

from typing import Any

from transformers_resps.generation.attach import attached


def generate(model: Any, **arguments: Any) -> Any:
    """As `generate` of an attached model; one that was not attached keeps nothing but what "auto" has learned."""
    with attached(model):
        return model.generate(**arguments)
