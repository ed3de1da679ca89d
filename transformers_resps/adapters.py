"""Adapters around a model (PEFT)."""

from typing import Any


def unwrapped(model: Any) -> Any:
    """The model itself, from inside an adapter's wrapper or as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
