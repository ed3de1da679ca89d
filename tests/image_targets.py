"""Tiny random targets of multimodal classes, and real processors for them, built without a download.

Their towers have as many layers as their decoders, so that nothing can take one for the other.
"""

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


VOCABULARY, LAYERS = 64, 4
IMAGE, VIDEO, BEGIN, END = 56, 57, 58, 59  # after the letters, which count from "a"

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
_PLANES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_PATCHES = {
    "depth": LAYERS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "initializer_range": 0.3,
}
_DEEPSTACK = _PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"text_config": _TEXT | _PLANES, "vision_config": _DEEPSTACK, **_QWEN_IDS},
    "cosmos3_omni": {
        "text_config": _TEXT | _PLANES | {"model_type": "qwen3_vl_text"},
        "vision_config": _DEEPSTACK | {"model_type": "qwen3_vl_vision"},
        **_QWEN_IDS,
    },
    "glm4v": {
        "text_config": _TEXT | _PLANES,
        "vision_config": _PATCHES | {"image_size": 16},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": BEGIN,
        "image_end_token_id": END,
        "video_start_token_id": 60,
        "video_end_token_id": 61,
    },
    "gemma3": {
        "text_config": _TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 64, "eos_token_id": 2},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
        "initializer_range": 0.3,
    },
    "gemma4": {
        "text_config": _TEXT
        | {
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": BEGIN,
        "eoi_token_id": END,
        "audio_token_id": 60,
        "boa_token_id": 61,
        "eoa_token_id": 62,
    },
}
IMAGE_TARGETS = list(_CONFIGS)


def image_target(model_type: str = "gemma3", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random target of a class of `IMAGE_TARGETS`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **_CONFIGS[model_type])
    return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


class _StillsProcessor(Qwen3VLProcessor):
    """Without a processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def image_processor(model_type: str = "gemma3") -> ProcessorMixin:
    """The processor of a random Gemma 3 or Qwen3-VL: a token per letter; an image is four or six tokens."""
    placeholder = {"gemma3": "<begin>", "qwen3_vl": "<begin><image><end>"}[model_type]
    template = (
        "{% for m in messages %}{{ 'h' if m.role == 'user' else 'i' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ '" + placeholder + "' if part.type == 'image' else part.text }}"
        "{% endfor %}{% endif %}{{ 'c' + '\n' }}{% endfor %}{% if add_generation_prompt %}i{% endif %}"
    )
    if model_type == "gemma3":
        resized = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return Gemma3Processor(resized, _tokenizer(), chat_template=template, image_seq_length=4)
    sizes = {"shortest_edge": 64, "longest_edge": 384}
    patches = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=sizes)
    return _StillsProcessor(patches, _tokenizer(), None, chat_template=template)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<begin>", "eoi_token": "<end>"}
    vocabulary = {chr(ord("a") + index): index for index in range(IMAGE)}
    vocabulary |= {token: IMAGE + index for index, token in enumerate(special.values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special |= {"vision_start_token": "<begin>", "vision_end_token": "<end>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="a",
        eos_token="c",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=special,
    )


def picture(seed: int = 0) -> Image.Image:
    """Noise, 24 pixels wide and 16 high."""
    noise = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def asked(text: str) -> list[dict[str, Any]]:
    """A question about one image, as TRL writes it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def image_prompt(model_type: str = "gemma3", seed: int = 0, text: str = "defgde") -> dict[str, Tensor]:
    """What `generate` takes for a question about a picture."""
    processor = image_processor(model_type)
    rendered = processor.apply_chat_template(asked(text), add_generation_prompt=True)
    made: dict[str, Tensor] = processor(
        text=[rendered], images=[[picture(seed)]], add_special_tokens=False, return_tensors="pt"
    )
    return dict(made)
