"""Read the folder of a head, of an MTP layer or of a policy."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from transformers_resps.drafting.kinds import MTP
from transformers_resps.heads import DraftHeadConfig
from transformers_resps.hub.upload import METRICS, RECIPE, RESULTS, as_hub_id
from transformers_resps.tools.results import SCHEMA_VERSION


CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TEXTS, _LISTS = {"target", "head", "license", "target_license", "method"}, {"languages", "limits"}
_OF_DATA, _DATA_NEEDS = {"name", "license", "what", "hub_id"}, {"name", "license", "what"}


class UnreadableArtefactError(ValueError):
    """A file of the folder is missing or invalid."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """The files of a folder.

    Attributes:
        folder: its path.
        config: `config.json`.
        recipe: `recipe.yaml`; its `card` holds what no run can know.
        metrics: `metrics.json`, written by the trainer.
        results: `results.json` of the benchmark; empty if missing or in another schema.
        measured: the folder of results and plots: its own, or for a policy without results its head's, if that lies
            next to it. Both were measured in one run, which stands once for each target.
        plots: PNG files, sorted.
    """

    folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def is_policy(self) -> bool:
        return "policy_type" in self.config

    @property
    def is_mtp(self) -> bool:
        return bool(self.config.get("model_type") == MTP.saved_as)

    @property
    def said(self) -> dict[str, Any]:
        """The `card` of the recipe."""
        return dict(self.recipe.get("card") or {})

    @property
    def target(self) -> str | None:
        """The target's name: the one in the recipe's `card`, otherwise the one it was loaded by."""
        return self.said.get("target") or self._trained_with("target")

    @property
    def target_id(self) -> str | None:
        """The target's Hub id, or `None` if its name is not one."""
        return as_hub_id(self.target)

    @property
    def head(self) -> str | None:
        """For a policy: the name of the head it was trained with."""
        return self.said.get("head") or self._trained_with("head")

    @property
    def measured(self) -> Path:
        if not self.is_policy or self.head is None or (self.folder / RESULTS).is_file():
            return self.folder
        beside = self.folder.resolve().parent / Path(self.head).name
        return beside if (beside / RESULTS).is_file() else self.folder

    @property
    def plots(self) -> list[Path]:
        return sorted(self.folder.glob("*.png")) or sorted(self.measured.glob("*.png"))

    def _trained_with(self, what: str) -> str | None:
        config = self.config["policy"] if self.config.get("policy_type") == "guard" else self.config
        return (config.get(what) or {}).get("name_or_path")


def read_artefact(folder: Path) -> Artefact:
    """Read a folder; missing files other than `config.json` count as empty.

    Raises:
        UnreadableArtefactError: `config.json` is missing or of something else, or a file is invalid.
    """
    config = _mapping(folder / CONFIG)
    kinds = (DraftHeadConfig.model_type, MTP.saved_as)
    if config.get("model_type") not in kinds and "policy_type" not in config:
        raise UnreadableArtefactError(
            f"{folder / CONFIG} "
            + ("describes neither a draft head nor a policy" if config else "is missing")
            + ". Pass a folder that `save_pretrained` of a `DraftHead` or policy wrote."
        )
    recipe = _mapping(folder / RECIPE)
    check_card(recipe.get("card"), folder / RECIPE)
    artefact = Artefact(folder, config, recipe, _mapping(folder / METRICS))
    results = _mapping(artefact.measured / RESULTS)
    return replace(artefact, results=results if results.get("schema_version") == SCHEMA_VERSION else {})


def check_card(card: Any, source: str | Path) -> None:
    """Check the `card` of a recipe; `None` is valid.

    Args:
        card: as read from YAML.
        source: name of the recipe, for the message.

    Raises:
        UnreadableArtefactError: lists every fault.
    """
    if faults := list(_card_faults(card)):
        raise UnreadableArtefactError(
            f"The `card` of {source} is invalid: {'; '.join(faults)}. See training/PUBLISHING.md for its fields, and "
            "quote words that YAML reads as another type, such as 'no'."
        )


def _card_faults(card: Any) -> Iterator[str]:
    if not isinstance(card, dict | None):
        yield f"it is {card!r}, but must be a mapping"
        return
    for name, value in (card or {}).items():
        if value is None:
            continue
        if name in _TEXTS and not _is_text(value):
            yield f"`{name}` is {value!r}, but must be a string"
        elif name in _LISTS and not (isinstance(value, list) and all(map(_is_text, value))):
            yield f"`{name}` is {value!r}, but must be a list of strings"
        elif name == "data" and not (isinstance(value, list) and all(map(_is_data, value))):
            yield f"`data` is {value!r}, but each item needs the strings `name`, `license`, `what`, maybe `hub_id`"
        elif name not in _TEXTS | _LISTS | {"data"}:
            yield f"`{name}` is not a field of a card"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_data(item: Any) -> bool:
    return isinstance(item, dict) and _DATA_NEEDS <= item.keys() <= _OF_DATA and all(map(_is_text, item.values()))


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UnreadableArtefactError(f"{file} cannot be read ({error}). Write it again, in UTF-8.") from error
    if not isinstance(value, dict):
        raise UnreadableArtefactError(
            f"{file} holds a {type(value).__name__}, but must hold a mapping. Write it again."
        )
    return value
