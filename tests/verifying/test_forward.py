"""What is caught of the target's forwards: hidden states and positions of the text decoder, of one part or several."""

import pytest
import torch
from transformers import DynamicCache

from tests.multimodal_targets import TARGETS, MultimodalTarget
from tests.targets import Architecture
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.forward import FeatureTap, TargetForward, decoder_layers, output_places


TEXT = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if str(kind) != "mllama"], ids=str)
@torch.no_grad()
def test_layers_are_the_text_decoders_where_a_tower_has_as_many(kind: MultimodalTarget) -> None:
    """A text alone runs no tower. Mllama then skips the layers that see images, too."""
    target = kind.build()
    layers = list(range(len(decoder_layers(target)) + 1))
    with FeatureTap(target, layers) as tap, tap.record() as features:
        target(input_ids=TEXT)
    assert features.concatenated().shape[:2] == TEXT.shape


@torch.no_grad()
def test_a_prompt_in_parts_gives_all_features_and_the_last_positions() -> None:
    """As PaliGemma does, the decoder is told to count from 1."""
    target = next(kind for kind in TARGETS if str(kind) == "llava").build()
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))

    def read() -> int:
        for part in (slice(0, 3), slice(3, 5)):
            positions = torch.arange(1, 6)[None, part]
            target(input_ids=TEXT[:, part], position_ids=positions, use_cache=True, **{CACHE_KEYWORD: cache})
        return 7

    with TargetForward(target, [0, 1], cache) as forward:
        found, features, positions = forward.read_by(read)
        whole = FeatureTap(target, [0, 1])
        with whole, whole.record() as expected:
            target(input_ids=TEXT, position_ids=torch.arange(1, 6)[None])
    assert found == 7 and positions is not None and positions.tolist() == [[4, 5]]
    torch.testing.assert_close(features.concatenated(), expected.concatenated())


@torch.no_grad()
def test_two_taps_on_one_target_catch_their_own_forwards_only() -> None:
    target = next(kind for kind in TARGETS if str(kind) == "llava").build()
    with FeatureTap(target, [0]) as first, FeatureTap(target, [0]) as second:
        with first.record() as features:
            target(input_ids=TEXT)
        with second.record() as others:
            target(input_ids=TEXT[:, :2])
    assert features.concatenated().shape[1] == 5 and others.concatenated().shape[1] == 2


def test_the_last_hidden_states_are_caught_before_and_after_the_final_norm() -> None:
    target = Architecture("gemma2").build("eager")
    last, tokens = target.config.num_hidden_layers, torch.arange(1, 9)[None]
    with torch.no_grad(), FeatureTap(target, [1, last, last + 1]) as tap, tap.record() as features:
        outputs = target(tokens, output_hidden_states=True)
    caught = [features.caught[layer] for layer in (1, last + 1)]
    assert output_places(target, [1, last + 1]) == [1, last]
    assert [torch.equal(one, outputs.hidden_states[place]) for one, place in zip(caught, (1, last), strict=True)]
    torch.testing.assert_close(target.get_decoder().norm(features.caught[last]), features.caught[last + 1])
    with pytest.raises(ValueError, match=r"reads the feature layers \[1, \d+\]"):
        FeatureTap(target, [1, last + 2])
