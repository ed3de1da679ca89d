"""Checks before a run, so that its result can be published when it ends."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is in `__all__` of a part
from transformers import TrainingArguments

from transformers_resps.hub.upload import RESULTS, Destination, Existing, as_hub_id, make_repository

from .artefact import check_card
from .privacy import private_facts


_NEEDED = ("license", "target_license", "languages", "data")
_LICENSE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")  # as the Hub writes them: apache-2.0, cc-by-4.0, mit, other
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]+)*|multilingual|code")  # ISO 639


def check_publishable(recipe: str, args: TrainingArguments, target: str) -> None:
    """Refuse a run whose result could not be published at its end; does nothing without `args.push_to_hub`.

    Makes the repository if it is missing. Called before any work.

    Args:
        recipe: from `recipe_of`.
        args: of the trainer.
        target: the name by which the artefact will remember its target.

    Raises:
        ValueError: lists every fault of the recipe.
        OSError: the Hub refuses the repository or the token, or the repository holds measurements.
    """
    if not args.push_to_hub:
        return
    card = (yaml.safe_load(recipe) or {}).get("card")
    check_card(card, "the recipe")
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    faults = [
        *private_facts("The command or its config", recipe),
        *card_faults(card or {}, (card or {}).get("target") or target, "the recipe"),
        *_repository_faults(name),
    ]
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ValueError(
            f"`push_to_hub` is set, but the result of this run could not be published:\n{listed}\nFix these (see "
            "training/PUBLISHING.md), or train without `push_to_hub` and publish the folder with training/publish.py."
        )
    if args.process_index == 0:
        private, token, revision = args.hub_private_repo, args.hub_token, args.hub_revision
        make_repository(Destination(name, private, token, revision), Existing(refuse=(RESULTS,)))


def card_faults(card: Mapping[str, Any], target: str | None, source: str) -> Iterator[str]:
    """Yield what the card of a published artefact lacks, and ids in it that the Hub would not take.

    Args:
        card: of the recipe, without faults of kind (`check_card`).
        target: its name in the card, or the one that the artefact remembers.
        source: name of the recipe, for the messages.
    """
    yield from target_faults(target, source)
    if unsaid := [name for name in _NEEDED if not card.get(name)]:
        yield f"The `card` of {source} lacks {', '.join(unsaid)}. Add them."
    data = card.get("data") or []
    licenses = [card.get("license"), card.get("target_license")]
    for license in filter(None, licenses):
        if not _LICENSE.fullmatch(license):
            yield f"The license {license!r} in {source} is no id of the Hub. Write it like `apache-2.0` or `other`."
    for language in card.get("languages") or []:
        if not _LANGUAGE.fullmatch(language):
            yield f"The language {language!r} in {source} is no ISO 639 code. Write it like `en`."
    for dataset in (item["hub_id"] for item in data if "hub_id" in item):
        if _is_no_id(dataset):
            yield f"The `hub_id` {dataset!r} in {source} is no id of a dataset. Write `owner/name`, or leave it out."


def target_faults(target: str | None, source: str) -> Iterator[str]:
    """Yield the faults of the name by which others load the target; `source` names the recipe, for the message."""
    if target is None:
        yield f"No file names the target. Put `target: HUB_ID` under `card` in {source}."
    elif as_hub_id(target) is None:
        yield f"The target {target!r} is not a Hub id. Put `target: HUB_ID` under `card` in {source}."


def _repository_faults(name: str) -> Iterator[str]:
    if _is_no_id(name):
        yield f"`hub_model_id` is {name!r}, but must be `owner/name`, of letters, digits, `-`, `_` and `.`."


def _is_no_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False
