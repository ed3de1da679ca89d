"""What lies in the folder of a head or a policy. Knows files: nothing of cards, models or the Hub's calls."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..bench.results import SCHEMA_VERSION
from ..head import DraftHeadConfig
from ..hub import METRICS, RESULTS, as_hub_id


CONFIG, WEIGHTS, RECIPE = "config.json", "model.safetensors", "recipe.yaml"
_TEXTS, _LISTS = {"target", "head", "license", "target_license", "method"}, {"languages", "limits"}
_OF_DATA, _DATA_NEEDS = {"name", "license", "what", "hub_id"}, {"name", "license", "what"}


class UnreadableArtefactError(ValueError):
    """A file of the folder is missing or is not what its name says."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """The facts of a folder.

    Attributes:
        folder: where it lies.
        config: `config.json`.
        recipe: `recipe.yaml`, as the training script read it; its `card` says what no file of a run can know.
        metrics: `metrics.json`, as the training script wrote it.
        results: `results.json` of the benchmark; empty when nobody measured with this release.
        plots: names of the PNG files, in order.
    """

    folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    plots: tuple[str, ...] = ()

    @property
    def is_policy(self) -> bool:
        return "policy_type" in self.config

    @property
    def said(self) -> dict[str, Any]:
        """The `card` of the recipe."""
        return dict(self.recipe.get("card") or {})

    @property
    def target(self) -> str | None:
        """The target's name; what the recipe's `card` says goes before what was loaded."""
        return self.said.get("target") or self._trained_with("target")

    @property
    def target_id(self) -> str | None:
        """The target's id on the Hub, if it is there."""
        return as_hub_id(self.target)

    @property
    def head(self) -> str | None:
        """Of a policy: the name of the head it was trained with."""
        return self.said.get("head") or self._trained_with("head")

    def _trained_with(self, what: str) -> str | None:
        config = self.config["policy"] if self.config.get("policy_type") == "guard" else self.config
        return (config.get(what) or {}).get("name_or_path")


def read_artefact(folder: Path) -> Artefact:
    """Read the facts of a folder; files that a young artefact lacks count as empty.

    Raises:
        UnreadableArtefactError: there is no `config.json` of ours, or a file is damaged.
    """
    config = _mapping(folder / CONFIG)
    if config.get("model_type") != DraftHeadConfig.model_type and "policy_type" not in config:
        raise UnreadableArtefactError(
            f"{folder / CONFIG} "
            + ("is of neither a head nor a policy" if config else "is missing")
            + ". A folder to publish is what `save_pretrained` of a `DraftHead` or a policy wrote. Check the path."
        )
    results, recipe = _mapping(folder / RESULTS), _mapping(folder / RECIPE)
    check_card(recipe.get("card"), folder / RECIPE)
    return Artefact(
        folder,
        config,
        recipe=recipe,
        metrics=_mapping(folder / METRICS),
        results=results if results.get("schema_version") == SCHEMA_VERSION else {},
        plots=tuple(sorted(file.name for file in folder.glob("*.png"))),
    )


def check_card(card: Any, source: str | Path) -> None:
    """Refuse the `card` of a recipe that no card can be rendered from; one that is left out is none.

    Args:
        card: as read from YAML.
        source: of the recipe, for the message.

    Raises:
        UnreadableArtefactError: lists all that is wrong.
    """
    if faults := list(_card_faults(card)):
        raise UnreadableArtefactError(
            f"The `card` of {source} cannot become a card: {'; '.join(faults)}. Its fields are shown in "
            "docs/publish.md. Mend them, and quote what YAML would take for something else, such as 'no'."
        )


def _card_faults(card: Any) -> Iterator[str]:
    if not isinstance(card, dict | None):
        yield f"it is {card!r}, but must be names and values"
        return
    for name, value in (card or {}).items():
        if value is None:
            continue
        if name in _TEXTS and not _is_text(value):
            yield f"`{name}` is {value!r}, but must be a text"
        elif name in _LISTS and not (isinstance(value, list) and all(map(_is_text, value))):
            yield f"`{name}` is {value!r}, but must be a list of texts"
        elif name == "data" and not (isinstance(value, list) and all(map(_is_data, value))):
            yield f"`data` is {value!r}, but each item must have the texts `name`, `license`, `what`, perhaps `hub_id`"
        elif name not in _TEXTS | _LISTS | {"data"}:
            yield f"`{name}` is no field of a card"


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
        raise UnreadableArtefactError(f"{file} cannot be read: {error}. It must be UTF-8. Write it again.") from error
    if not isinstance(value, dict):
        raise UnreadableArtefactError(
            f"{file} holds a {type(value).__name__}, but names and values are needed. Write it again."
        )
    return value
