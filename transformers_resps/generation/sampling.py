"""How a temperature is asked of `generate`."""

from typing import Any


def sampling(temperature: float) -> dict[str, Any]:
    """Return keywords of `generate`: greedy at 0, otherwise the target's whole distribution at that temperature."""
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": 1.0}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
