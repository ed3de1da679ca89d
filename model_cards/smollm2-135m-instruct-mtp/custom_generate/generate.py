"""Draft trees on a stock model, with the installed package transformers-resps doing all of the work.

    model.generate(**inputs, custom_generate=REPO_ID, trust_remote_code=True)

A repository that holds a target's own files as well, a bundle, needs neither:

    AutoModelForCausalLM.from_pretrained(REPO_ID, trust_remote_code=True).generate(**inputs)
"""

from typing import Any

from transformers_resps.generation.attach import attach, attached


# Publishing writes these: what a call decodes with that names neither a head nor a policy.
HEAD: str | None = "model_cards/smollm2-135m-instruct-mtp"
POLICY: str | None = "auto"


def generate(*inputs: Any, model: Any, **arguments: Any) -> Any:
    """As `generate` of an attached model.

    A model that was loaded from this repository is attached for good. One that was not keeps nothing but what "auto"
    has learned.
    """
    loaded = vars(model).pop("generate", None)  # loading put this function into the model, where it hides the class's
    if loaded is not None:
        try:
            attach(model, assistant_model=HEAD, policy=POLICY)
        except (ValueError, OSError):
            model.generate = loaded
            raise
        return model.generate(*inputs, **arguments)
    named = arguments.get("assistant_model"), arguments.get("policy")
    if named == (None, None):
        arguments.update(assistant_model=HEAD, policy=POLICY)
    elif named[0] is None and named[1] != "plain":
        arguments["assistant_model"] = HEAD
    with attached(model):
        return model.generate(*inputs, **arguments)
