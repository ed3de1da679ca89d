"""Draft trees on a stock model, with the installed package transformers-resps doing all of the work.

model.generate(**inputs, custom_generate=REPO_ID, trust_remote_code=True, assistant_model=head, policy=policy)
"""

from typing import Any

from transformers_resps import ReSpSGenerationMixin, attach, detach


def generate(model: Any, **arguments: Any) -> Any:
    """As `generate` of an attached model; a model that was not attached is left as it was."""
    was_attached = isinstance(model, ReSpSGenerationMixin)
    try:
        return attach(model).generate(**arguments)
    finally:
        if not was_attached:
            detach(model)
