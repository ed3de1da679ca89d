"""The YAML at the top of a card, which links a head or a policy to its target on the Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData


LIBRARY = "transformers-resps"
GENERAL_TAGS = ("speculative-decoding", "transformers-resps")


def as_hub_id(name: str | None) -> str | None:
    """`name` if it reads as an id of the Hub and is no folder here."""
    is_id = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_id else None


def shareable(config: Any) -> Any:
    """JSON values without local paths: a `name_or_path` of a local folder, at any depth, becomes the folder's name."""
    if not isinstance(config, Mapping):
        return config
    told = {key: shareable(value) for key, value in config.items()}
    name = str(told.get("name_or_path") or "")
    return {**told, "name_or_path": Path(name).resolve().name} if name and Path(name).is_dir() else told


def card_data(
    target: str | None,
    tags: Sequence[str],
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> ModelCardData:
    """The metadata of a card.

    `base_model_relation` is `adapter`. Of the four values that the Hub knows (adapter, finetune, merge, quantized) it
    is the one for weights that are of use only beside the unchanged weights of the base model. Where it is left out,
    as most publishers of draft heads do, the Hub takes `finetune`, which is wrong: the target is not changed.

    Args:
        target: Hub id, or `None` when the target is not on the Hub.
        tags: in the order shown.
        license: of the artefact, a short name that the Hub knows.
        languages: ISO codes.
        datasets: Hub ids.
    """
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        base_model=target,
        base_model_relation="adapter" if target else None,
        license=license,
        language=list(languages) or None,
        datasets=list(datasets) or None,
        tags=list(tags),
    )
