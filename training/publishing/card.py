"""Render the card of a head or a policy from its files alone: the text is in `card.md.jinja`.

Needs jinja2, which torch installs.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from transformers_resps import TreeShape
from transformers_resps.hub.upload import GENERAL_TAGS, card_data
from transformers_resps.tools.results import ALL, PLAIN, SAME_TEXT_INVARIANT, method_cell, same_text, summary_cells

from .artefact import Artefact


# Of repositories with `custom_generate/`: how Transformers finds them, and the papers that cards cite.
CUSTOM_TAGS = ("custom_generate", "arxiv:2503.01840", "arxiv:2601.12212")

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
Table = tuple[list[str], list[str], list[list[str]]]  # headings of words, headings of numbers, rows


def render_card(artefact: Artefact, name: str, *, with_plots: bool = False) -> str:
    """Render the card; a section without facts is left out.

    Args:
        artefact: the folder.
        name: what a user passes to `from_pretrained`: a Hub id or a folder.
        with_plots: the plots lie beside the card, as in a published repository, and not where they are here.
    """
    said, results, default_tree = artefact.said, artefact.results, artefact.config.get("default_tree")
    data = card_data(
        artefact.target_id,
        [
            "mtp" if artefact.is_mtp else "eagle3",
            *(["draft-policy"] if artefact.is_policy else ["draft-head", "draft-model"]),
            *CUSTOM_TAGS,
            *GENERAL_TAGS,
        ],
        license=said.get("license"),
        language=said.get("languages") or None,
        datasets=[data["hub_id"] for data in said.get("data") or () if "hub_id" in data] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        is_policy=artefact.is_policy,
        is_mtp=artefact.is_mtp,
        target=artefact.target_id,  # a folder's name loads nothing elsewhere
        head=artefact.head,
        said=said,
        config=artefact.config,
        metrics=artefact.metrics,
        results=results,
        has_recipe=bool(artefact.recipe),
        plots={file.name: file.name if with_plots else _place(file, artefact.folder) for file in artefact.plots},
        default_tree=TreeShape(*default_tree) if default_tree else None,
        agreement=_agreement(artefact.metrics),
        overall=_overall(results) if results else None,
        by_dataset=_by_dataset(results) if results else None,
        same_text_invariant=SAME_TEXT_INVARIANT,
    )
    return f"{card}\n"  # Jinja drops the last one of a template


def _place(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


def _agreement(metrics: dict[str, Any]) -> Table:
    """Agreement with the target, a column per draft level."""
    agreement = metrics.get("agreement") or {}
    return [], list(agreement), [[f"{value:.3f}" for value in agreement.values()]]


def _overall(results: dict[str, Any]) -> Table:
    """One row per method over all prompts, with its interval; estimated ceilings are in italics."""
    rows = [
        [*_temperature(results, row["temperature"]), *summary_cells(row), same_text(row, results)]
        for row in results["summaries"][ALL]
    ]
    numbers = ["tokens/s", "ratio to plain", "95% interval", "tau", "same text as plain"]
    return [*_temperature(results), "method"], numbers, rows


def _by_dataset(results: dict[str, Any]) -> Table | None:
    """Ratio to plain of every method on every dataset, tau in brackets; `None` for a single dataset."""
    datasets = [name for name in results["summaries"] if name != ALL]
    if len(datasets) < 2:
        return None
    methods = list(dict.fromkeys(method_cell(row) for row in results["summaries"][ALL] if row["method"] != PLAIN))
    rows = []
    for dataset in datasets:
        for temperature in results["settings"]["temperatures"]:
            found = {
                method_cell(row): f"{row['ratio']:.2f}" + (f" ({row['tau']:.2f})" if row["measured"] else "")
                for row in results["summaries"][dataset]
                if row["temperature"] == temperature
            }
            cells = [found.get(method, "") for method in methods]
            rows.append([dataset, *_temperature(results, temperature), *cells])
    return ["dataset", *_temperature(results)], methods, rows


def _temperature(results: dict[str, Any], value: float | None = None) -> list[str]:
    """A cell of a column that exists only with several temperatures; its heading without `value`."""
    if len(results["settings"]["temperatures"]) == 1:
        return []
    return ["temperature" if value is None else f"{value:g}"]
