"""Turn what a run has left into a folder to publish: metrics, recipe, card, code. Knows what training scripts know."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..hub import METRICS
from .artefact import RECIPE, check_card
from .private_facts import private_facts
from .release import write_card, write_custom_generate


def head_metrics(evaluation: dict[str, float], tree: str, held_out_texts: int, tau_texts: int) -> dict[str, Any]:
    """`metrics.json` of a head from what its trainer's `evaluate` returned.

    Args:
        evaluation: with `eval_top1_1`, `eval_top1_2`, ... and perhaps `eval_tau`.
        tree: total_tokens/depth/top_k of the tree that tau was simulated with.
        held_out_texts: texts evaluated.
        tau_texts: of these, how many tau was simulated on.
    """
    prefix = "eval_top1_"
    agreement = {name.removeprefix(prefix): value for name, value in evaluation.items() if name.startswith(prefix)}
    metrics: dict[str, Any] = {}
    if agreement:
        metrics |= {"held_out_texts": held_out_texts, "agreement": agreement}
    if "eval_tau" in evaluation:
        metrics |= {"tau_texts": min(tau_texts, held_out_texts), "simulated_tau": {tree: evaluation["eval_tau"]}}
    return metrics


def recipe_of(command: list[str], settings: dict[str, Any], *, is_pushed: bool) -> str:
    """`recipe.yaml` of a run that begins; what is edited while it runs was not what it did.

    Args:
        command: as typed. The file behind its `--config` is the recipe, with the command above it.
        settings: the recipe of a run without such a file.
        is_pushed: the run ends on the Hub, so the recipe must be fit to be seen.

    Raises:
        ValueError: no card can be rendered from it, or it is to be pushed and names paths or people.
    """
    recipe = _recipe(command, settings)
    check_card((yaml.safe_load(recipe) or {}).get("card"), "the recipe")
    if is_pushed and (private := list(private_facts("The command or its config", recipe))):
        raise ValueError(
            f"`push_to_hub` would publish what is private. {' '.join(private)} Or train without `push_to_hub`, and "
            "publish the folder afterwards with training/publish.py."
        )
    return recipe


def write_run(folder: Path, metrics: dict[str, Any], recipe: str, *, name: str | None = None) -> None:
    """Write `metrics.json`, `recipe.yaml`, the card and `custom_generate/` beside the weights in `folder`.

    Args:
        folder: of the head or policy.
        metrics: see `head_metrics`; with `training`, what the run took.
        recipe: as `recipe_of` read it before the run.
        name: what the card calls the artefact: the repository it is pushed to, or else its folder.
    """
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    write_custom_generate(folder)
    write_card(folder, name)


def _recipe(command: list[str], settings: dict[str, Any]) -> str:
    if "--config" in command[:-1]:
        told = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8")
    else:
        told = yaml.safe_dump(settings, sort_keys=False)
    typed = ["python", f"training/{Path(command[0]).name}", *command[1:]]  # wherever the checkout lies
    return f"# {shlex.join(typed)}\n{told}"
