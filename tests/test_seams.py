"""The private seams of Transformers that the engine stands on. A release that moves one fails here, by name."""

import inspect

import pytest
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

from transformers_resps.generation import _AFTER_ASSISTANT, _NOT_OURS, ReSpSGenerationMixin


def test_the_decoding_methods_are_looked_up_on_the_class_by_these_names() -> None:
    assert GENERATION_MODES_MAPPING[GenerationMode.ASSISTED_GENERATION] == "_assisted_decoding"
    assert GENERATION_MODES_MAPPING[GenerationMode.SAMPLE] == "_sample"
    assert GENERATION_MODES_MAPPING[GenerationMode.GREEDY_SEARCH] == "_sample"


@pytest.mark.parametrize("name", ["_assisted_decoding", "_sample"])
def test_decoding_methods_are_told_nothing_that_we_do_not_know(name: str) -> None:
    theirs = set(inspect.signature(getattr(GenerationMixin, name)).parameters)
    ours = set(inspect.signature(ReSpSGenerationMixin._speculate).parameters) - {"request"}
    assert theirs <= ours | set(_NOT_OURS)


def test_generate_has_the_parameters_we_name() -> None:
    theirs = list(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
    ours = list(inspect.signature(ReSpSGenerationMixin.generate).parameters)[1:8]
    assert theirs == [*ours, *_AFTER_ASSISTANT]


def test_cache_layers_have_what_we_touch() -> None:
    sliding = DynamicSlidingWindowLayer(sliding_window=8)
    assert sliding.is_sliding and not DynamicLayer.is_sliding
    assert {"keys", "values"} <= set(vars(sliding)) | set(dir(sliding))
    assert callable(sliding.activate_past_recording) and callable(sliding.crop)


def test_decoding_may_be_wrapped_for_experts() -> None:
    assert hasattr(GenerationMixin, "_optimize_model_for_decode")
