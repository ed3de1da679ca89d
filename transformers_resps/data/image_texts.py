"""Process texts with images by the target's processor, which inserts tokens for each image and returns pixels.

Only the processor knows how many tokens an image takes, so it is needed to prepare a dataset. Prepared datasets keep
the images. Pixels are large, so they are computed again for each batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin


IMAGE_COLUMNS = ("images", "pictures")  # columns that only a prepared dataset with images has


@dataclass(slots=True)
class Pictures:
    """The images of one text, and the text's parts that show them; a part is the rendered text before an answer."""

    images: list[Any]  # in the order of the text
    texts: list[str] = field(default_factory=list)  # parts, rendered with a placeholder for each image
    counts: list[int] = field(default_factory=list)  # number of images in each part
    starts: list[int] = field(default_factory=list)  # index of each part's first token
    key: str = ""  # a hash of the processor's output for all parts

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Pictures | None":
        """Read the pictures of a row that `prepare_dataset` made; return `None` if its text shows no images."""
        parts = row.get("pictures")
        if not parts or not parts["texts"]:
            return None
        return cls(images_of(row)[: sum(parts["counts"])], **parts)

    @property
    def parts(self) -> dict[str, Any]:
        """A prepared row's value in the column `pictures`: `texts`, `counts` and `starts` of the parts, and `key`."""
        return {"texts": self.texts, "counts": self.counts, "starts": self.starts, "key": self.key}

    def before(self, place: int) -> "Pictures | None":
        """Return only the parts that begin before token number `place`, and their images; `None` if there are none."""
        kept = sum(start < place for start in self.starts)
        if not kept:
            return None
        counts = self.counts[:kept]
        return Pictures(self.images[: sum(counts)], self.texts[:kept], counts, self.starts[:kept], self.key)

    def add(self, processor: ProcessorMixin, text: str, count: int, start: int, room: int) -> list[int] | None:
        """Add `text`, the next part, which begins at token `start` and shows `count` images; return its token ids.

        If the part has more than `room` tokens, adds nothing and returns `None`.
        """
        shown = sum(self.counts)
        read = _read(processor, [text], [self.images[shown : shown + count]])
        tokens: list[int] = read["input_ids"][0].tolist()
        if len(tokens) > room:
            return None
        self.texts.append(text)
        self.counts.append(count)
        self.starts.append(start)
        content = [name.encode() + read[name].float().numpy().tobytes() for name in sorted(read)]
        self.key = hashlib.sha256(b"".join([self.key.encode(), *content])).hexdigest()
        return tokens


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row as a list. Its column `images` may hold a list, one image, or `None`."""
    images = row["images"]
    return list(images) if isinstance(images, list | tuple) else [] if images is None else [images]


def _read(processor: Any, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
    """Run the processor on texts and each text's images; the chat template has already added the special tokens."""
    padding = {"padding": True, "padding_side": "right"} if len(texts) > 1 else {}
    return dict(processor(text=texts, images=images, add_special_tokens=False, return_tensors="pt", **padding))


def image_inputs(rows: Sequence[Pictures | None], processor: ProcessorMixin, length: int) -> dict[str, Tensor]:
    """Compute the image arguments of the target's forward from each row's pictures; return `{}` if no row has
    pictures. Token type ids are right-padded to `[b, length]`; other tensors are the processor's output, unchanged.
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
    """Return `processing_class`, by default the target's processor; `None` if it is only a tokenizer or missing."""
    if processing_class is not None or not target.config.name_or_path:
        return processing_class if isinstance(processing_class, ProcessorMixin) else None
    try:
        processor = AutoProcessor.from_pretrained(target.config.name_or_path)
    except (OSError, ValueError):
        return None
    return processor if isinstance(processor, ProcessorMixin) else None
