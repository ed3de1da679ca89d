"""Render, check and publish the folder of a head or policy, from the files of its training and benchmark."""

from .artefact import Artefact, UnreadableArtefactError, read_artefact
from .bundle import write_bundle
from .card import render_card
from .checks import find_faults
from .publishable import check_publishable, target_faults
from .release import check_folder, files_of, publish, recipe_of, write_card, write_custom_generate, write_run


__all__ = [
    "Artefact",
    "UnreadableArtefactError",
    "check_folder",
    "check_publishable",
    "files_of",
    "find_faults",
    "publish",
    "read_artefact",
    "recipe_of",
    "render_card",
    "target_faults",
    "write_bundle",
    "write_card",
    "write_custom_generate",
    "write_run",
]
