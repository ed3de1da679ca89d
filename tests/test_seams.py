"""The private seams of Transformers that the engine stands on. A release that moves one fails here, by name."""

import inspect

from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

from transformers_resps.generation import _AFTER_ASSISTANT, ReSpSGenerationMixin


def test_assisted_generation_is_looked_up_on_the_class_by_this_name() -> None:
    assert GENERATION_MODES_MAPPING[GenerationMode.ASSISTED_GENERATION] == "_assisted_decoding"


def test_assisted_decoding_takes_the_parameters_we_take() -> None:
    theirs = list(inspect.signature(GenerationMixin._assisted_decoding).parameters)
    assert theirs == list(inspect.signature(ReSpSGenerationMixin._assisted_decoding).parameters)


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
