"""The ways to read the file of a draft head or of MTP layers, and what reads it so."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedModel

from ..assistants import MtpHead
from ..drafting import TrainableSource
from ..heads import DraftHead, DraftHeadConfig
from ..heads.model import RotaryEmbedding


_SHIFTS = (0, 1, -1)
_BASES = (1e4, 1e6)


@dataclass(frozen=True, slots=True)
class HeadReading:
    """One way to read a head's file, as the overrides of `DraftHead.from_pretrained`."""

    loader: ClassVar[str] = "DraftHead"

    feature_layers: tuple[int, ...]
    rope_theta: float
    norm_before_residual: bool
    before_deepstack: bool = False

    @property
    def told(self) -> dict[str, str]:
        """What a table has of it."""
        return {
            "feature layers": ", ".join(map(str, self.feature_layers)) + " before DeepStack" * self.before_deepstack,
            "RoPE base": f"{self.rope_theta:g}",
            "norm before residual": "yes" if self.norm_before_residual else "no",
        }


@dataclass(frozen=True, slots=True)
class MtpReading:
    """One way to read MTP layers, as the overrides of `MtpHead.from_pretrained`; see `MtpConfig`."""

    loader: ClassVar[str] = "MtpHead"
    before_deepstack: ClassVar[bool] = False

    feature_layer: int
    fed: str
    fed_back: str
    hidden_first: bool
    zero_centred: bool
    own_output_head: bool

    @property
    def told(self) -> dict[str, str]:
        """What a table has of it."""
        return {
            "layer": str(self.feature_layer),
            "fed": f"{self.fed} norm",
            "fed back": "the target's" if self.fed_back == "target" else f"{self.fed_back} norm",
            "order": "state, token" if self.hidden_first else "token, state",
            "norms": "1 + w" if self.zero_centred else "w",
            "output head": "own" if self.own_output_head else "target's",
        }


Reading = HeadReading | MtpReading


def readings_of(
    source: TrainableSource, target: PreTrainedModel, *, has_images: bool, has_output_heads: bool
) -> list[Reading]:
    """The configured reading first, then the others that this target has layers for.

    Of a head: the feature layers as read, one deeper and one shallower; the RoPE base as read, 1e4, 1e6 and the
    target's; the residual of the first layer before and after its norm; and, where answers are about images, the
    features before and after what DeepStack adds. Of MTP layers: the layer likewise; its state fed before and after
    the target's final norm; fed back before and after the own norm, or the target's state again; both orders of the
    pair; both kinds of norms; and, where their file has output heads, these or the target's.
    """
    if isinstance(source, MtpHead):
        return list(_of_mtp(source, target, has_output_heads))
    assert isinstance(source, DraftHead)
    return list(_of_head(source.config, target, has_images))


def _of_head(config: DraftHeadConfig, target: PreTrainedModel, has_images: bool) -> Iterator[HeadReading]:
    assert config.feature_layers is not None and config.rope_parameters is not None
    layer_count = target.config.get_text_config().num_hidden_layers
    theirs = getattr(target.config.get_text_config(), "rope_parameters", None) or {}
    theirs = theirs.get("full_attention") or theirs  # in Gemma 3 each type of layers has its own
    tower = getattr(target.config, "vision_config", None)
    is_ambiguous = has_images and bool(getattr(tower, "deepstack_visual_indexes", None))
    base = config.rope_parameters["rope_theta"]
    bases = dict.fromkeys([base, *_BASES, *(b for b in [theirs.get("rope_theta")] if b)])
    for shift in _SHIFTS:
        layers = tuple(layer + shift for layer in config.feature_layers)
        if layers[0] < 0 or layers[-1] > layer_count:
            continue
        for theta in bases:
            for is_before in (config.norm_before_residual, not config.norm_before_residual):
                for flips in (False, True)[: 1 + is_ambiguous]:
                    yield HeadReading(layers, theta, is_before, config.before_deepstack is not flips)


def _of_mtp(source: MtpHead, target: PreTrainedModel, has_output_heads: bool) -> Iterator[MtpReading]:
    settings, last = source.settings, target.config.get_text_config().num_hidden_layers
    layer = last if settings.feature_layer is None else settings.feature_layer
    axes = [
        [at for at in (layer + shift for shift in _SHIFTS) if 0 < at <= last],
        _from(settings.fed, "after", "before"),
        _from(settings.fed_back, *(("after", "before") if settings.own_norm else ()), "target"),
        _from(settings.hidden_first, False, True),
        _from(source.is_zero_centred(target), False, True),
        _from(settings.own_output_head, *((False, True) if has_output_heads else ())),
    ]
    return (MtpReading(*values) for values in product(*axes))


def _from(configured: Any, *known: Any) -> list[Any]:
    """What is configured, then the others that are known."""
    return list(dict.fromkeys([configured, *known]))


def read_as(source: TrainableSource, reading: Reading, target: PreTrainedModel, weights: Any) -> TrainableSource:
    """The source as another reading has it, with these `weights`, shared and not copied."""
    if isinstance(source, MtpHead):
        return cast(MtpHead, weights).read_as(target, **{**asdict(source.settings), **asdict(reading)})
    assert isinstance(source, DraftHead) and isinstance(reading, HeadReading)
    config = DraftHeadConfig.from_dict(source.config.to_dict())
    config.feature_layers = list(reading.feature_layers)
    config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": reading.rope_theta}
    config.norm_before_residual = reading.norm_before_residual
    config.before_deepstack = reading.before_deepstack
    with torch.device("meta"):
        variant = DraftHead(config)
    variant.load_state_dict(weights.state_dict(), assign=True)
    variant.rotary_emb = RotaryEmbedding(config).to(source.device)
    variant.train(False)
    return variant
