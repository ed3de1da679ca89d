"""Find all faults of a folder before it is published."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from benchmarking.provenance import config_sha256, weights_sha256
from transformers_resps import SuffixMemory
from transformers_resps.data import TRAINING_PROMPTS, read_training_prompts
from transformers_resps.heads import DraftHead
from transformers_resps.hub.upload import CARD, METRICS, RECIPE, RESULTS
from transformers_resps.policies.saving import AutoPolicy
from transformers_resps.tools.results import SCHEMA_VERSION

from .artefact import CONFIG, WEIGHTS, Artefact, read_artefact
from .card import render_card
from .custom_code import CUSTOM_GENERATE, is_ours
from .privacy import private_facts
from .publishable import card_faults


_MAX_BYTES = {".safetensors": 5 << 30}  # the Hub's limit for one upload over HTTP
_MAX_OTHER_BYTES = 10 << 20  # the Hub's limit for files outside Git LFS
KINDS = {".json", ".yaml", ".md", ".png", ".safetensors"}
_TEXTS = {".json", ".yaml"}


def find_faults(folder: Path, *names: str) -> list[str]:
    """Return every reason not to publish `folder`, each with what to do.

    Args:
        folder: of a head or a policy.
        names: under which the card's example may load it.
    """
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    faults = [fault for file in files for fault in _file_faults(folder, file, names)]
    missing = [name for name in (CONFIG, CARD, METRICS, RECIPE) if not (folder / name).is_file()]
    faults += [f"{name} is missing. {_ORIGINS[name]}" for name in missing]
    if CONFIG in missing:
        return faults
    try:
        artefact = read_artefact(folder)
        if not (artefact.measured / RESULTS).is_file():
            faults.append(f"{RESULTS} is missing. {_ORIGINS[RESULTS]}")
        if not artefact.is_policy and not (folder / WEIGHTS).is_file():
            return [*faults, f"{WEIGHTS} is missing. {_ORIGINS[WEIGHTS]}"]
        if not artefact.is_mtp:  # which takes its sizes from its target
            (AutoPolicy if artefact.is_policy else DraftHead).from_pretrained(folder)
    except (ValueError, OSError) as error:
        return [*faults, str(error)]
    return [*faults, *_content_faults(artefact, names)]


_ORIGINS = {
    CONFIG: "`save_pretrained` writes it: check the path.",
    WEIGHTS: "`save_pretrained` writes it: save the head again.",
    CARD: "Render it: run training/publish.py with --render.",
    RESULTS: "Measure these weights: run training/benchmark.py with --output, and copy the file here.",
    METRICS: "Training writes it: copy it from the run's output folder.",
    RECIPE: "Copy the YAML file that the run was started with.",
}


def _file_faults(folder: Path, file: Path, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the faults of one file."""
    name = file.relative_to(folder).as_posix()
    if file.is_symlink():
        yield f"{name} is a link, but only plain files are published. Copy the file itself."
        return
    if name.startswith(f"{CUSTOM_GENERATE}/"):
        if not is_ours(folder, file, names):
            yield f"{name} is code that this release did not write. Delete it: publishing writes it again."
        return
    if SuffixMemory.is_saved_in(file):
        yield f"{name} is a memory, which holds users' texts. Move it away."
        return
    if "/" in name or file.suffix not in KINDS:
        yield (
            f"{name} is not a file of a head or policy: only {', '.join(sorted(KINDS))} files are published, no code "
            "and no pickle. Move it away."
        )
        return
    if file.stat().st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        yield f"{name} is marked as executable. Run `chmod -x` on it."
    most = _MAX_BYTES.get(file.suffix, _MAX_OTHER_BYTES)
    if file.stat().st_size > most:
        yield f"{name} has {file.stat().st_size:,} bytes, but the Hub takes at most {most:,}. Make it smaller."
    if file.suffix in _SNIFFERS:
        yield from _SNIFFERS[file.suffix](file)
    if file.suffix in _TEXTS:
        yield from private_facts(file.name, file.read_text(encoding="utf-8", errors="replace"))


def _not_safetensors(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        yield f"{file.name} is not a whole safetensors file ({error}). Save it again."


def _not_png(file: Path) -> Iterator[str]:
    with file.open("rb") as opened:
        if opened.read(8) != b"\x89PNG\r\n\x1a\n":
            yield f"{file.name} is not a PNG image. Write it again, or move it away."


_SNIFFERS: dict[str, Callable[[Path], Iterator[str]]] = {".safetensors": _not_safetensors, ".png": _not_png}


def read_results(file: Path) -> dict[str, Any]:
    """Read `results.json`. Raises `ValueError` when it has another schema or is no results file."""
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = results.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as results of `resps bench` ({error}). Measure again.") from error
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema {schema!r}, but this release reads {SCHEMA_VERSION}. "
            "Measure again, or read the file with the release that wrote it."
        )
    return results


def _result_faults(artefact: Artefact) -> Iterator[str]:
    """Yield why results may not be published: another schema, other weights, or doubts about them."""
    folder = artefact.folder
    try:
        results = read_results(artefact.measured / RESULTS)
    except ValueError as error:
        yield str(error)
        return
    for kind, own in (("weights", weights_sha256(folder)), ("config", config_sha256(folder))):
        if own not in results.get(f"{kind}_sha256", {}).values():
            yield (
                f"{RESULTS} was measured with other {kind} (SHA-256 here: {str(own)[:16]}...). Run "
                "training/benchmark.py with this folder."
            )
    doubts = {
        "is partial, because the benchmark was stopped": results["partial"],
        "was measured with `--accept-noise` on a possibly busy machine": results["noise"]["accepted"],
        "has outputs that differ from plain decoding beyond rounding": results["unexplained"],
    }
    for doubt in [text for text, holds in doubts.items() if holds]:
        yield f"{RESULTS} {doubt}. Complete, quiet and lossless results are needed: run training/benchmark.py again."


def _training_prompt_faults(folder: Path) -> Iterator[str]:
    """Yield a fault if the hashes of the training prompts are missing or damaged."""
    try:
        is_kept = read_training_prompts(folder) is not None
    except ValueError as error:
        yield str(error)
        return
    if not is_kept:
        yield (
            f"{TRAINING_PROMPTS} is missing, so others may measure on prompts that it was trained on. Copy the file "
            "that the training script wrote, or call `write_training_prompts`."
        )


def _content_faults(artefact: Artefact, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the faults of the contents, once all files could be loaded."""
    folder = artefact.folder
    if (folder / RECIPE).is_file():
        yield from card_faults(artefact.said, artefact.target, RECIPE)
    if (folder / METRICS).is_file() and not artefact.metrics.get("training"):
        yield f"{METRICS} has no `training`. Copy the file that the training script wrote."
    if (folder / WEIGHTS).is_file():  # a policy without weights has learned nothing
        yield from _training_prompt_faults(folder)
    if (artefact.measured / RESULTS).is_file():
        yield from _result_faults(artefact)
    if (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
        if all(card != render_card(artefact, name) for name in names):
            yield f"{CARD} does not match the other files. Run training/publish.py with --render."
