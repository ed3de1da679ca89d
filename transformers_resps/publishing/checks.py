"""What keeps a folder from being published, all of it at once.

Knows files; loads the artefact to see that it loads.
"""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..bench.provenance import config_sha256, weights_sha256
from ..bench.results import read_results
from ..head import DraftHead
from ..hub import CARD, METRICS, RESULTS
from ..policy import AutoPolicy
from ..trainers.training_prompts import TRAINING_PROMPTS, read_training_prompts
from .artefact import CONFIG, RECIPE, WEIGHTS, Artefact, read_artefact
from .card import render_card
from .custom_code import CUSTOM_GENERATE, is_ours
from .private_facts import private_facts


_MOST_BYTES = {".safetensors": 5 << 30}  # the Hub's for one upload over HTTP
_MOST_OTHER_BYTES = 10 << 20  # the Hub's for files that are not stored apart
KINDS = {".json", ".yaml", ".md", ".png", ".safetensors"}
_TEXTS = {".json", ".yaml"}
_CARD_NEEDS = ("license", "target_license", "languages", "data")


def find_faults(folder: Path, *names: str) -> list[str]:
    """Every reason not to publish `folder`, each with what is needed and what to do; empty when there is none.

    Args:
        folder: of a head or a policy.
        names: what the card may call the artefact in its example.
    """
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    faults = [fault for file in files for fault in _file_faults(folder, file)]
    missing = [name for name in (CONFIG, CARD, RESULTS, METRICS, RECIPE) if not (folder / name).is_file()]
    faults += [f"{name} is missing. {_ORIGINS[name]}" for name in missing]
    if CONFIG in missing:
        return faults
    try:
        artefact = read_artefact(folder)
        if not artefact.is_policy and not (folder / WEIGHTS).is_file():
            return [*faults, f"{WEIGHTS} is missing. {_ORIGINS[WEIGHTS]}"]
        (AutoPolicy if artefact.is_policy else DraftHead).from_pretrained(folder)
    except (ValueError, OSError) as error:
        return [*faults, str(error)]
    return [*faults, *_content_faults(artefact, names)]


_ORIGINS = {
    CONFIG: "It is written by `save_pretrained`: check the path.",
    WEIGHTS: "It is written by `save_pretrained`: export the head again.",
    CARD: "It must be the rendered card: run training/publish.py with --render.",
    RESULTS: "A published artefact needs measurements of exactly these weights: run `resps bench` with --output.",
    METRICS: "It is written at the end of training: copy it from the run's output folder.",
    RECIPE: "The settings of the run are needed to repeat it: copy the YAML file that it was started with.",
}


def _file_faults(folder: Path, file: Path) -> Iterator[str]:
    """Faults of one file, whatever the artefact is."""
    name = file.relative_to(folder).as_posix()
    if file.is_symlink():
        yield f"{name} is a link, which may point anywhere. Plain files are needed. Copy the file itself."
        return
    if name.startswith(f"{CUSTOM_GENERATE}/"):
        if not is_ours(folder, file):
            yield f"{name} is code that this release did not write. Delete it; it is written anew when publishing."
        return
    if "/" in name or file.suffix not in KINDS:
        yield (
            f"{name} does not belong to a head or policy: only {', '.join(sorted(KINDS))} files are published, no "
            "code and no pickle. Move it away."
        )
        return
    if file.stat().st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        yield f"{name} is marked as a program, but files to read are needed. Run `chmod -x` on it."
    most = _MOST_BYTES.get(file.suffix, _MOST_OTHER_BYTES)
    if file.stat().st_size > most:
        yield f"{name} has {file.stat().st_size:,} bytes, but the Hub takes at most {most:,}. Make it smaller."
    yield from _SNIFFERS.get(file.suffix, _no_faults)(file)
    if file.suffix in _TEXTS:
        yield from private_facts(file.name, file.read_text(encoding="utf-8", errors="replace"))


def _no_faults(file: Path) -> Iterator[str]:
    yield from ()


def _not_safetensors(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        yield f"{file.name} is not a whole safetensors file ({error}). Save the artefact again."


def _not_png(file: Path) -> Iterator[str]:
    with file.open("rb") as opened:
        if opened.read(8) != b"\x89PNG\r\n\x1a\n":
            yield f"{file.name} is not a PNG image. Draw it again, or move it away."


_SNIFFERS: dict[str, Callable[[Path], Iterator[str]]] = {".safetensors": _not_safetensors, ".png": _not_png}


def _result_faults(folder: Path) -> Iterator[str]:
    """Results of another release, of other weights, or not worth publishing."""
    try:
        results = read_results(folder / RESULTS)
    except ValueError as error:
        yield str(error)
        return
    for kind, own in (("weights", weights_sha256(folder)), ("config", config_sha256(folder))):
        if own not in results.get(f"{kind}_sha256", {}).values():
            yield (
                f"{RESULTS} was measured with other {kind}: here the SHA-256 is {str(own)[:16]}..., which it does not "
                "name. Run `resps bench` with this folder."
            )
    doubts = {
        "is partial: the benchmark was stopped": results["partial"],
        "was measured on a machine that was allowed to be busy": results["noise"]["accepted"],
        "has answers that differ from plain ones beyond rounding": results["unexplained"],
    }
    for doubt in [text for text, holds in doubts.items() if holds]:
        yield f"{RESULTS} {doubt}. Whole, quiet and lossless measurements are needed. Run `resps bench` again."


def _training_prompt_faults(folder: Path) -> Iterator[str]:
    """Without the prompts that it learned from, whoever measures it may measure on them."""
    try:
        is_kept = read_training_prompts(folder) is not None
    except ValueError as error:
        yield str(error)
        return
    if not is_kept:
        yield (
            f"{TRAINING_PROMPTS} is missing. Hashes of the prompts that it was trained on are needed, or others may "
            "measure it on them. Copy the file that the training script wrote, or call `write_training_prompts`."
        )


def _content_faults(artefact: Artefact, names: tuple[str, ...]) -> Iterator[str]:
    """Faults of the facts, once all files could be read."""
    folder = artefact.folder
    if artefact.target is None:
        yield f"Nothing says what it is for. Put `target: HUB_ID` under `card` in {RECIPE}."
    elif artefact.target_id is None:
        yield (
            f"The target is called {artefact.target!r}, which is no id of the Hub. Put `target: HUB_ID` under `card` "
            f"in {RECIPE}."
        )
    if (folder / RECIPE).is_file() and (unsaid := [name for name in _CARD_NEEDS if not artefact.said.get(name)]):
        yield f"The `card` of {RECIPE} says nothing of {', '.join(unsaid)}, which a card must tell. Add them."
    if (folder / METRICS).is_file() and not artefact.metrics.get("training"):
        yield f"{METRICS} has no `training`: what the run took. Copy the file that the training script wrote."
    if (folder / WEIGHTS).is_file():  # a policy without weights has learned nothing
        yield from _training_prompt_faults(folder)
    if (folder / RESULTS).is_file():
        yield from _result_faults(folder)
    if (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
        if all(card != render_card(artefact, name) for name in names):
            yield f"{CARD} is not what the other files render to. Run training/publish.py with --render."
