"""Write what a training run adds to the folder of a head or policy: metrics, recipe, card and code."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from transformers_resps.hub.upload import METRICS

from .artefact import RECIPE, check_card
from .release import write_card, write_custom_generate


def head_metrics(evaluation: dict[str, float], tree: str, held_out_texts: int, tau_texts: int) -> dict[str, Any]:
    """Make `metrics.json` of a head from the result of its trainer's `evaluate`.

    Args:
        evaluation: with `eval_accuracy_1`, `eval_accuracy_2`, ... and optionally `eval_tau`.
        tree: total_tokens/depth/top_k of the tree that tau was simulated with.
        held_out_texts: number of sequences evaluated.
        tau_texts: number of these that tau was simulated on.
    """
    prefix = "eval_accuracy_"
    agreement = {name.removeprefix(prefix): value for name, value in evaluation.items() if name.startswith(prefix)}
    metrics: dict[str, Any] = {}
    if agreement:
        metrics |= {"held_out_texts": held_out_texts, "agreement": agreement}
    if "eval_tau" in evaluation:
        metrics |= {"tau_texts": min(tau_texts, held_out_texts), "simulated_tau": {tree: evaluation["eval_tau"]}}
    return metrics


def recipe_of(command: list[str], settings: dict[str, Any]) -> str:
    """Make `recipe.yaml` when a run starts, so that later edits of its config do not matter.

    Args:
        command: as typed. The recipe is the file after its `--config`, with the command above it.
        settings: the recipe of a run without `--config`.

    Raises:
        ValueError: its `card` is invalid.
    """
    recipe = _recipe(command, settings)
    check_card((yaml.safe_load(recipe) or {}).get("card"), "the recipe")
    return recipe


def write_run(folder: Path, metrics: dict[str, Any], recipe: str, *, name: str | None = None) -> None:
    """Write `metrics.json`, `recipe.yaml`, the card and `custom_generate/` beside the weights in `folder`.

    Args:
        folder: of the head or policy.
        metrics: see `head_metrics`; its `training` tells size and duration of the run.
        recipe: from `recipe_of`, made before the run.
        name: what the card's example loads: the repository, by default the folder.
    """
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    write_custom_generate(folder, name)
    write_card(folder, name)


def _recipe(command: list[str], settings: dict[str, Any]) -> str:
    if "--config" in command[:-1]:
        told = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8")
    else:
        told = yaml.safe_dump(settings, sort_keys=False)
    typed = ["python", f"training/{Path(command[0]).name}", *command[1:]]  # wherever the checkout lies
    return f"# {shlex.join(typed)}\n{told}"
