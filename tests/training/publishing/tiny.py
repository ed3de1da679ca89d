"""A target that calls itself by an id of the Hub, and what a recipe tells of it for a card."""

from typing import Any

from transformers import PreTrainedModel

from tests.conftest import build_target


TARGET = "maker/tiny-1M-Instruct"
DATA = {"name": "Letters", "license": "mit", "what": "answered by the target itself"}
CARD: dict[str, Any] = {"target": "maker/tiny", "license": "mit", "target_license": "apache-2.0"}
CARD |= {"languages": ["en"], "data": [DATA]}


def tiny_target() -> PreTrainedModel:
    target = build_target()
    target.config.name_or_path = TARGET
    return target
