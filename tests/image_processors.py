"""Real processors for two of the tiny multimodal targets, built without a download, and pictures for them.

Token i below `START` is the i-th letter, as in `tokenizers.py`.
"""

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Gemma3Processor, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, Qwen3VLProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.multimodal_targets import START, TARGETS
from tests.tokenizers import turns


MARKS = ("<start>", "<listen>", "<end>", "<image>", "<video>", "<audio>")
# "h" begins a user turn, "i" an assistant's, "c" and a line break end both
_TEMPLATE = (
    "{% for m in messages %}{{ 'h' if m.role == 'user' else 'i' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ 'PLACE' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ 'c' + '\n' }}{% endfor %}{% if add_generation_prompt %}i{% endif %}"
)


def image_target(model_type: str = "gemma3") -> PreTrainedModel:
    """The tiny target of this type, in float32."""
    (target,) = (target for target in TARGETS if target.model_type == model_type)
    torch.manual_seed(0)  # of the vectors, which are as a fresh model has them
    return target.build().float()


class _StillsProcessor(Qwen3VLProcessor):
    """Without a processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def image_processor(model_type: str = "gemma3") -> ProcessorMixin:
    """The processor of `gemma3`, where an image is four tokens, or of `qwen3_vl`, where a picture is six."""
    if model_type == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
        template = _TEMPLATE.replace("PLACE", "<start>")
        return Gemma3Processor(images, _tokenizer(), chat_template=template, image_seq_length=4)
    sizes = {"shortest_edge": 16, "longest_edge": 96}
    patches = Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, temporal_patch_size=2, size=sizes)
    template = _TEMPLATE.replace("PLACE", "<start><image><end>")
    return _StillsProcessor(patches, _tokenizer(), None, chat_template=template)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {chr(ord("a") + index): index for index in range(START)}
    vocabulary |= {mark: START + index for index, mark in enumerate(MARKS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"image_token": "<image>", "video_token": "<video>"}
    special |= {"boi_token": "<start>", "eoi_token": "<end>"}  # as Gemma calls them
    special |= {"vision_start_token": "<start>", "vision_end_token": "<end>"}  # as Qwen does
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="a",
        eos_token="c",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=special,
    )


def picture(seed: int = 0) -> Image.Image:
    """Noise, 12 pixels wide and 8 high."""
    noise = torch.randint(0, 256, (8, 12, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def parts(messages: list[dict[str, str]], *, images: int = 0) -> list[dict[str, Any]]:
    """The same messages with lists of parts as contents, as TRL writes them; the first shows so many images."""
    found: list[dict[str, Any]] = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]} for message in messages
    ]
    found[0]["content"][:0] = [{"type": "image"}] * images
    return found


def image_prompt(processor: ProcessorMixin, seed: int = 0, text: str = "defgde") -> dict[str, Tensor]:
    """What `generate` takes for a question about a picture."""
    rendered = processor.apply_chat_template(parts(turns(text), images=1), add_generation_prompt=True)
    made = processor(text=[rendered], images=[[picture(seed)]], add_special_tokens=False, return_tensors="pt")
    return dict(made)
