"""Tiny random targets that see and hear, and prompts with real pixels and sounds for them.

A prompt is written as it stands: every `.` is a token of text, `I` an image, `V` a video, `S` a sound.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from tests.targets import SIZES
from transformers_resps.generation.output import left_padded


VOCABULARY = 16  # so few that a tree may hold all pairs of tokens
START, LISTEN, END, IMAGE, VIDEO, AUDIO = MARKS = range(10, VOCABULARY)  # the tokens before them are text
_LAYERS = 3  # of decoders and towers alike: whoever takes the wrong ones finds as many


@dataclass(frozen=True, eq=False)
class Medium:
    """What one image, video or sound is to a target.

    Attributes:
        tokens: that stand for it in the prompt.
        arguments: of the forward. A tuple is a shape to draw; a list stays as it is.
    """

    tokens: list[int]
    arguments: dict[str, tuple[int, ...] | list[Any]]

    def draw(self, name: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        value = self.arguments[name]
        if isinstance(value, tuple):
            return torch.randn(value, generator=generator, dtype=torch.float64).to(dtype)
        return torch.tensor(value)


@dataclass(frozen=True, eq=False)
class MultimodalTarget:
    """A class of Transformers, and what its prompts hold.

    Attributes:
        model_type: of its config.
        media: by letter.
        config: of the whole.
        text: of its decoder.
        tower: of what sees or hears.
        types: the argument that names the kind of each token, where there is one.
        kinds: of the placeholders; other tokens are of kind 0.
        per_row: each row has one entry, padded with zeros, instead of one for each medium of all rows.
        seed: of its weights, chosen for a lively text.
        attention: its implementation.
        dtype: fp64 where its kernels have it, so that rounding can hide nothing.
    """

    model_type: str
    media: Mapping[str, Medium]
    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, Any] = field(default_factory=dict)
    types: str | None = None
    kinds: Mapping[int, int] = field(default_factory=lambda: {IMAGE: 1, VIDEO: 2, AUDIO: 3})
    per_row: bool = False
    seed: int = 1
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.model_type

    @property
    def letter(self) -> str:
        """Of its first medium."""
        return next(iter(self.media))

    @property
    def is_recurrent(self) -> bool:
        return not {"conv", "linear_attention"}.isdisjoint(self.text.get("layer_types", ()))

    def build(self) -> PreTrainedModel:
        """A random model that never writes a placeholder, as trained ones do not."""
        tower = "audio_config" if self.letter == "S" else "vision_config"
        parts = {"text_config": _TEXT | self.text, tower: self.tower, "tie_word_embeddings": False}
        config = AutoConfig.for_model(self.model_type, **(parts | self.config))
        torch.manual_seed(self.seed)
        model = AutoModelForMultimodalLM.from_config(config, attn_implementation=self.attention, dtype=self.dtype)
        _redraw(model, torch.Generator().manual_seed(self.seed))
        model.generation_config.suppress_tokens = [*MARKS]
        return model.eval()

    def prompt(self, *rows: str, seed: int = 0) -> dict[str, Tensor]:
        """The arguments of `generate`, rows padded on the left; another seed draws other media for the same text."""
        text, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        lines = [self._tokens(row, text) for row in rows]
        ids, mask = left_padded([torch.tensor(line) for line in lines])
        inputs = {"input_ids": ids, "attention_mask": mask} | self._drawn(rows, noise)
        if self.types:
            inputs[self.types] = sum(((ids == token) * kind for token, kind in self.kinds.items()), ids * 0)
        return inputs

    def follow(self, said: Tensor, mask: Tensor, *messages: str, seed: int = 0) -> dict[str, Tensor]:
        """What was `said`, `[b, s]` after a prompt with this mask, and a message to each row with media of its own."""
        new = self.prompt(*messages, seed=seed)
        seen = torch.cat([mask, mask.new_ones(len(said), said.shape[1] - mask.shape[1])], dim=1)
        old = {"input_ids": said, "attention_mask": seen, self.types: torch.zeros_like(said)}
        return {name: torch.cat([old[name], value], 1) if name in old else value for name, value in new.items()}

    def _tokens(self, row: str, generator: torch.Generator) -> list[int]:
        tokens = []
        for letter in row:
            tokens += _text(1, generator) if letter == "." else self.media[letter].tokens
        return tokens

    def _drawn(self, rows: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """The arguments of all media of all rows."""
        found: dict[str, list[list[Tensor]]] = {}
        for index, row in enumerate(rows):
            for letter in row.replace(".", ""):
                for name in self.media[letter].arguments:
                    of_rows = found.setdefault(name, [[] for _ in rows])
                    of_rows[index].append(self.media[letter].draw(name, generator, self.dtype))
        if self.per_row:
            return {name: _padded(drawn) for name, drawn in found.items()}
        return {name: torch.cat([each for row in drawn for each in row]) for name, drawn in found.items()}


def _text(count: int, generator: torch.Generator) -> list[int]:
    found: list[int] = torch.randint(1, START, (count,), generator=generator).tolist()
    return found


def _padded(rows: list[list[Tensor]]) -> Tensor:
    """`[b, most media of a row, ...]`, zeros for the media that a row lacks."""
    most, one = max(map(len, rows)), next(row[0] for row in rows if row)
    return torch.stack([torch.cat(row + [torch.zeros_like(one)] * (most - len(row))) for row in rows])


@torch.no_grad()
def _redraw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw all weights anew, so that projections keep their input's size and pixels decide what is written."""
    for name, weight in model.named_parameters():
        if weight.numel() == 1:
            weight.fill_(1)  # a gate, closed in a fresh model
        elif weight.dim() >= 2 and "A_log" not in name:
            inputs = weight.shape[-1] if weight.dim() == 3 else weight[0].numel()
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 2 / math.sqrt(inputs))


_TEXT = SIZES | {"vocab_size": VOCABULARY, "num_hidden_layers": _LAYERS, "tie_word_embeddings": False}
_LLAMA = {"model_type": "llama"}
_QWEN2 = {"model_type": "qwen2", "sliding_window": None}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "shared_expert_intermediate_size": 16,
}
_DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_IMAGE_ID = {"image_token_id": IMAGE, "image_token_index": IMAGE}


# --- grids of patches, in the manner of Qwen ------------------------------------------------------------------------

_PLANES = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    }
}
_GRID_CONFIG = _IMAGE_ID | {
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "audio_start_token_id": LISTEN,
    "audio_end_token_id": END,
}
_GRID_TOWER: dict[str, Any] = {
    "depth": _LAYERS,
    "num_hidden_layers": _LAYERS,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "num_patches": 16,
    "image_size": 8,
    "window_size": 8,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
}


def _images(*pixels: int, tokens: int = 6, **more: list[Any]) -> Medium:
    """Of 4 x 6 patches, which are 2 x 3 tokens."""
    return Medium(
        [START, *[IMAGE] * tokens, END], {"pixel_values": (24, *pixels), "image_grid_thw": [[1, 4, 6]]} | more
    )


def _videos(*pixels: int, apart: bool = False, **more: list[Any]) -> Medium:
    """Of two frames of 4 x 4 patches; each frame between marks of its own where they stand apart."""
    frames = [START, *[VIDEO] * 4, END] * 2 if apart else [START, *[VIDEO] * 8, END]
    return Medium(frames, {"pixel_values_videos": (32, *pixels), "video_grid_thw": [[2, 4, 4]]} | more)


def _grid(model_type: str, *parts: dict[str, Any], **options: Any) -> MultimodalTarget:
    """A target whose positions have several planes; `parts` extend its text config."""
    text = _PLANES | {name: value for part in parts for name, value in part.items()}
    usual = {"media": {"I": _images(24), "V": _videos(24)}, "types": "mm_token_type_ids"}
    config, tower = _GRID_CONFIG | options.pop("config", {}), _GRID_TOWER | options.pop("tower", {})
    return MultimodalTarget(model_type, config=config, text=text, tower=tower, **(usual | options))


_ONLY_IMAGES = {"media": {"I": _images(24)}}
_FRAMES = {"media": {"I": _images(24), "V": _videos(24, apart=True)}}
_FLOAT32 = {"dtype": torch.float32}
_OMNI_AUDIO = {
    "d_model": 32,
    "encoder_layers": _LAYERS,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "output_dim": 32,
    "max_source_positions": 16,
    "downsample_hidden_size": 8,
}


def _omni(model_type: str, frames: int, tokens: int, *parts: dict[str, Any], **options: Any) -> MultimodalTarget:
    """A target that hears `tokens` tokens in `frames` frames, too."""
    sound = {"input_features": (1, 8, frames), "feature_attention_mask": [[1] * frames]}
    video = _videos(24, video_second_per_grid=[1.0])
    media = {"I": _images(24), "V": video, "S": Medium([LISTEN, *[AUDIO] * tokens, END], sound)}
    return _grid(model_type, *parts, media=media, types=None, config={"audio_config": _OMNI_AUDIO}, **options)


_GRIDS = [
    _grid("qwen3_5", _DELTA_NET, **_FRAMES, **_FLOAT32, seed=0),
    _grid("qwen3_5_moe", _DELTA_NET, _EXPERTS, **_FRAMES, **_FLOAT32, seed=0),
    _grid("qwen2_vl", seed=6),
    _grid("qwen2_5_vl", seed=4),
    _grid("qwen3_vl", **_FRAMES, seed=3),
    _grid("qwen3_vl_moe", _EXPERTS, **_FRAMES, **_FLOAT32, seed=3),
    _omni("qwen2_5_omni_thinker", 16, 4, seed=2),
    _omni("qwen3_omni_moe_thinker", 100, 13, _EXPERTS, **_FLOAT32, seed=8),
    _grid("glm4v", **_ONLY_IMAGES),
    _grid("glm4v_moe", _EXPERTS, **_ONLY_IMAGES, **_FLOAT32),
    _grid("glm46v", {"model_type": "glm4v_text"}, tower={"model_type": "glm4v_vision"}, **_ONLY_IMAGES),
    _grid("glm_ocr", **_ONLY_IMAGES),
    _grid(
        "cosmos3_edge", config={"projector_hidden_size": 32}, media={"I": _images(12), "V": _videos(12, apart=True)}
    ),
    _grid("cosmos3_omni", {"model_type": "qwen3_vl_text"}, tower={"model_type": "qwen3_vl_vision"}, **_FRAMES, seed=3),
    _grid(
        "exaone4_5",
        {"model_type": "exaone4", "sliding_window": 8, "layer_types": _MIXED, "rope_parameters": None},
        types=None,
        seed=3,
    ),
    _grid("paddleocr_vl", media={"I": _images(3, 2, 2)}),
    _grid(
        "hunyuan_vl",
        media={"I": _images(12, tokens=10)},
        tower={"text_hidden_size": 32, "max_image_size": 8, "temporal_patch_size": 1},
        seed=7,
    ),
    _grid(
        "video_llama_3",
        _QWEN2,
        {"rope_parameters": None},
        media={"I": _images(12, image_merge_sizes=[2]), "V": _videos(12, video_merge_sizes=[2])},
        types=None,
        seed=2,
    ),
    _grid(
        "lfm3_vl",
        {"model_type": "lfm3", "layer_types": ["conv", "sliding_attention", "conv"], "sliding_window": 8},
        {"rope_parameters": None},
        config={"projector_hidden_size": 32},
        types=None,
        **_FLOAT32,
        seed=0,
    ),
]

# --- images of one size ---------------------------------------------------------------------------------------------

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_FINE = _TOWER | {"patch_size": 2}
_CLIP, _SIGLIP = _TOWER | {"model_type": "clip_vision_model"}, _TOWER | {"model_type": "siglip_vision_model"}
_PIXTRAL = _FINE | {"model_type": "pixtral", "head_dim": 8}
_PIXELS = {"pixel_values": (1, 3, 8, 8)}
_SIZED = _PIXELS | {"image_sizes": [[8, 8]]}
_TILED = {"pixel_values": (1, 2, 3, 8, 8), "image_sizes": [[8, 8]]}
_PINPOINTS = {"image_grid_pinpoints": [[8, 8]]}


def _patches(side: int) -> dict[str, Any]:
    """`side` x `side` flat patches, each with its place."""
    places = [[x, y] for y in range(side) for x in range(side)]
    return {"pixel_values": (1, len(places), 12), "image_position_ids": [places]}


_SIGLIP2 = {"pixel_values": (1, 16, 12), "spatial_shapes": [[4, 4]], "pixel_attention_mask": [[1] * 16]}
_PACKED = {"pixel_values": (1, 3, 8, 8), "pixel_attention_mask": [[[1] * 8] * 8]}
_TILES = {"pixel_values": (1, 3, 8, 8), "pixel_attention_mask": [True]}
_GEMMA = {"sliding_window": 8, "layer_types": _MIXED, "query_pre_attn_scalar": 8}
_GEMMA4 = _GEMMA | {"use_bidirectional_attention": "vision", "global_head_dim": 16}
_COHERE = {"model_type": "cohere2", "sliding_window": 8, "layer_types": _MIXED}


def _seen(
    model_type: str, text: dict[str, Any], tower: dict[str, Any], arguments: dict[str, Any] = _PIXELS, **options: Any
) -> MultimodalTarget:
    """A target of images that are `tokens` placeholders each."""
    tokens = [IMAGE] * options.pop("tokens", 4)
    config = _IMAGE_ID | options.pop("config", {})
    return MultimodalTarget(model_type, {"I": Medium(tokens, arguments)}, config, text, tower, **options)


_IMAGES = [
    # of five tokens of an image the model makes a square
    _seen("gemma3", _GEMMA, _SIGLIP | _FINE, types="token_type_ids", config={"mm_tokens_per_image": 5}, seed=4),
    _seen(
        "gemma4",
        _GEMMA4 | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY},
        _FINE | {"pooling_kernel_size": 2, "head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 16},
        _patches(4),
        types="mm_token_type_ids",
        config={"video_token_id": VIDEO, "audio_token_id": AUDIO, "audio_config": None},
        seed=5,
    ),
    _seen(
        "gemma4_unified",
        _GEMMA4,
        {"patch_size": 1, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        _patches(2),
        types="mm_token_type_ids",
        config={"video_token_id": VIDEO, "audio_token_id": AUDIO, "audio_config": None},
    ),
    _seen(
        "paligemma",
        {"model_type": "gemma"},
        _SIGLIP,
        types="token_type_ids",
        kinds={},
        config={"projection_dim": 32, "hidden_size": 32, "vocab_size": VOCABULARY},
        seed=5,
    ),
    _seen("llava", _LLAMA, _CLIP, config={"vision_feature_layer": -1}, seed=5),
    _seen("llava_next", _LLAMA, _CLIP, _TILED, tokens=10, config=_PINPOINTS, seed=5),
    _seen("llava_onevision", _QWEN2, _SIGLIP, _TILED, tokens=10, config=_PINPOINTS, seed=6),
    _seen(
        "vipllava", _LLAMA, _CLIP, config={"vision_feature_layers": [-1, -2], "vision_feature_layer": [-1, -2]}, seed=3
    ),
    _seen("mistral3", {"model_type": "mistral", "sliding_window": None}, _PIXTRAL, _SIZED, seed=6),
    _seen("internvl", _QWEN2, _TOWER | {"image_size": [8, 8], "patch_size": [2, 2]}, seed=3),
    _seen("aya_vision", _COHERE, _SIGLIP | _FINE, seed=2),
    _seen("cohere2_vision", _COHERE, _SIGLIP | _FINE, config={"alignment_intermediate_size": 32}, seed=0),
    _seen("smolvlm", _LLAMA, _FINE, _PACKED, per_row=True),
    _seen("idefics3", _LLAMA, _FINE, _PACKED, per_row=True),
    _seen(
        "idefics2",
        {"model_type": "mistral", "sliding_window": None},
        _FINE,
        _PACKED,
        per_row=True,
        config={
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 4,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            }
        },
    ),
    _seen(
        "granite_docling",
        {f"{name}_multiplier": 1.0 for name in ("embedding", "residual", "attention")},
        _FINE | {"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]},
        _TILES,
        per_row=True,
    ),
    _seen("lighton_ocr", {"model_type": "qwen3"}, _PIXTRAL, _SIZED, seed=0),
    _seen(
        "lfm2_vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
        _FINE | {"model_type": "siglip2_vision_model", "num_patches": 16},
        _SIGLIP2,
        config={"projector_hidden_size": 32},
        **_FLOAT32,
        seed=0,
    ),
    _seen(
        "step3p7",
        _EXPERTS
        | {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "share_expert_dim": 16,
            "sliding_window": 8,
            "layer_types": _MIXED,
        },
        _FINE | {"image_size": 16, "mlp_ratio": 1.5},
        {"pixel_values": (1, 3, 16, 16)},
        **_FLOAT32,
        seed=0,
    ),
    _seen(
        "got_ocr2",
        _QWEN2,
        _TOWER
        | {"image_size": 32, "window_size": 4, "output_channels": 32, "mlp_dim": 48, "global_attn_indexes": [1]},
        {"pixel_values": (1, 3, 32, 32)},
        attention="eager",
        **_FLOAT32,
        seed=0,
    ),
    _seen(
        "aria",
        {"moe_num_experts": 4},
        _TOWER | {"model_type": "idefics3_vision"},
        _PIXELS | {"pixel_mask": [[[True] * 8] * 8]},
        config={"projector_patch_to_query_dict": {4: 4}},
        **_FLOAT32,
    ),
    _seen(
        "mllama",
        {"cross_attention_layers": [3], "num_hidden_layers": 4, "bos_token_id": 1},
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "attention_heads": 4,
            "num_hidden_layers": _LAYERS,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
        },
        {"pixel_values": (1, 1, 3, 8, 8), "aspect_ratio_ids": [1], "aspect_ratio_mask": [[1]]},
        tokens=1,
        per_row=True,
        seed=0,
    ),
]

# --- sounds ---------------------------------------------------------------------------------------------------------

_HEARING = _OMNI_AUDIO | {
    "encoder_ffn_dim": 128,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_source_positions": 8,
}


def _heard(
    model_type: str, text: dict[str, Any], frames: int, tokens: int, mask: str | None, **options: Any
) -> MultimodalTarget:
    """A target that hears `tokens` tokens in `frames` frames."""
    sound: dict[str, Any] = {"input_features": (1, 8, frames)} | ({mask: [[1] * frames]} if mask else {})
    config = {"audio_token_id": AUDIO, "audio_token_index": AUDIO}
    tower = _HEARING | {"model_type": f"{model_type}_encoder"}
    return MultimodalTarget(model_type, {"S": Medium([AUDIO] * tokens, sound)}, config, text, tower, **options)


_SOUNDS = [
    _heard("qwen2_audio", _QWEN2, 16, 4, "feature_attention_mask", seed=3),
    _heard("voxtral", _LLAMA, 16, 2, None, seed=3),
    _heard("glmasr", _LLAMA, 16, 2, "input_features_mask", seed=0),
    _heard("qwen3_asr", {"model_type": "qwen3"}, 100, 13, "input_features_mask", seed=3),
]

TARGETS = [target for target in _GRIDS + _IMAGES + _SOUNDS if target.model_type in CONFIG_MAPPING]


def target_named(model_type: str) -> MultimodalTarget:
    return next(target for target in TARGETS if target.model_type == model_type)
