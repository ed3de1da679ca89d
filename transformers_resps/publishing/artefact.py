"""What lies in the folder of a head or a policy. Knows files: nothing of cards, models or the Hub's calls."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..bench.results import SCHEMA_VERSION
from ..head import DraftHeadConfig
from ..hub import as_hub_id


CONFIG, WEIGHTS, RESULTS, METRICS, RECIPE, CARD = (
    "config.json",
    "model.safetensors",
    "results.json",
    "metrics.json",
    "recipe.yaml",
    "README.md",
)


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
        return self.said.get("target") or (self.config.get("target") or {}).get("name_or_path")

    @property
    def target_id(self) -> str | None:
        """The target's id on the Hub, if it is there."""
        return as_hub_id(self.target)

    @property
    def head(self) -> str | None:
        """Of a policy: the name of the head it was trained with."""
        return self.said.get("head") or (self.config.get("head") or {}).get("name_or_path")


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
    results = _mapping(folder / RESULTS)
    return Artefact(
        folder,
        config,
        recipe=_mapping(folder / RECIPE),
        metrics=_mapping(folder / METRICS),
        results=results if results.get("schema_version") == SCHEMA_VERSION else {},
        plots=tuple(sorted(file.name for file in folder.glob("*.png"))),
    )


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
