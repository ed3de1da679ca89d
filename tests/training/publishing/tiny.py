"""A target that calls itself by an id of the Hub."""

from transformers import PreTrainedModel

from tests.conftest import build_target


TARGET = "maker/tiny-1M-Instruct"


def tiny_target() -> PreTrainedModel:
    target = build_target()
    target.config.name_or_path = TARGET
    return target
