"""Process texts with images by the target's processor, which inserts tokens for each image and returns pixels.

Only the processor knows how many tokens an image takes, so it is needed to prepare a dataset. Prepared datasets keep
the images. Pixels are large, so they are computed again for each batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin


# Further columns of a prepared dataset with images.
IMAGE_COLUMNS = ("images", "image_texts", "image_counts", "image_starts", "image_key")
# Values of the last four columns in a row without images.
NO_IMAGES: tuple[list[str], list[int], list[int], str] = ([], [], [], "")


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of one text, and the parts of the text that contain images."""

    images: list[Any]  # in the order of the text
    texts: list[str]  # parts, rendered by the chat template with a placeholder for each image
    counts: list[int]  # number of images in each part
    starts: list[int]  # index of each part's first token
    key: str  # a hash of the processor's output

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Pictures | None":
        """Collect the pictures of a row that `prepare_dataset` made; `None` if it has no images."""
        if not row.get("image_texts"):
            return None
        texts, counts, starts, key = (row[column] for column in IMAGE_COLUMNS[1:])
        return cls(images_of(row)[: sum(counts)], texts, counts, starts, key)

    def before(self, place: int) -> "Pictures | None":
        """Return only the parts that begin before token number `place`, with their images; `None` if none does."""
        kept = sum(start < place for start in self.starts)
        if not kept:
            return None
        counts = self.counts[:kept]
        return Pictures(self.images[: sum(counts)], self.texts[:kept], counts, self.starts[:kept], self.key)

    @property
    def columns(self) -> tuple[list[str], list[int], list[int], str]:
        """The values of `IMAGE_COLUMNS` except its first column, the images."""
        return self.texts, self.counts, self.starts, self.key


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row as a list. Its column `images` may hold a list, one image, or `None`."""
    images = row["images"]
    return list(images) if isinstance(images, list | tuple) else [] if images is None else [images]


class ImageReader:
    """Tokenizes the parts of one text that contain images, one after the other, and collects its `Pictures`."""

    def __init__(self, processor: ProcessorMixin, images: list[Any]) -> None:
        self._processor, self._images = processor, images
        self._texts: list[str] = []
        self._counts: list[int] = []
        self._starts: list[int] = []
        self._digest = hashlib.sha256()

    def tokens_of(self, text: str, count: int, start: int, room: int) -> list[int] | None:
        """Tokenize the part at token `start`, with `count` images; return `None` if it has more than `room` tokens."""
        shown = sum(self._counts)
        read = _read(self._processor, [text], [self._images[shown : shown + count]])
        tokens: list[int] = read["input_ids"][0].tolist()
        if len(tokens) > room:
            return None
        self._texts.append(text)
        self._counts.append(count)
        self._starts.append(start)
        for name in sorted(read):
            self._digest.update(name.encode() + read[name].float().numpy().tobytes())
        return tokens

    @property
    def pictures(self) -> Pictures | None:
        if not self._texts:
            return None
        shown = self._images[: sum(self._counts)]
        return Pictures(shown, self._texts, self._counts, self._starts, self._digest.hexdigest())


def _read(processor: Any, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
    """Run the processor without adding special tokens, since the chat template already added them; as in TRL."""
    padding = {"padding": True, "padding_side": "right"} if len(texts) > 1 else {}
    return dict(processor(text=texts, images=images, add_special_tokens=False, return_tensors="pt", **padding))


def image_inputs(rows: Sequence[Pictures | None], processor: ProcessorMixin, length: int) -> dict[str, Tensor]:
    """Return the image arguments of the target's forward for a batch; `{}` if no row has images. Token type ids are
    right-padded to `[b, length]`; other tensors are the processor's output for all images of the batch.
    """
    parts, texts, images = list[tuple[int, int]](), list[str](), list[list[Any]]()
    for row, shown in enumerate(rows):
        if shown is not None:
            left = iter(shown.images)
            parts += [(row, start) for start in shown.starts]
            texts += shown.texts
            images += [list(islice(left, count)) for count in shown.counts]
    if not parts:
        return {}
    read = _read(processor, texts, images)
    is_token = read.pop("attention_mask").bool()
    del read["input_ids"]
    for name in [name for name in read if name.endswith("token_type_ids")]:
        types = torch.zeros(len(rows), length, dtype=read[name].dtype)
        for (row, start), own_types, mask in zip(parts, read[name], is_token, strict=True):
            types[row, start : start + int(mask.sum())] = own_types[mask]
        read[name] = types
    return read


def cast_for(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Move inputs to the device of `model`, and convert floats to its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def load_processor(target: PreTrainedModel, processing_class: Any = None) -> ProcessorMixin | None:
    """Return `processing_class` or, if it is missing, the target's processor; `None` if it cannot process images."""
    if processing_class is not None or not target.config.name_or_path:
        return processing_class if isinstance(processing_class, ProcessorMixin) else None
    try:
        processor = AutoProcessor.from_pretrained(target.config.name_or_path)
    except (OSError, ValueError):
        return None
    return processor if isinstance(processor, ProcessorMixin) else None
