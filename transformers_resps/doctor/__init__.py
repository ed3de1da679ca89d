"""The doctor finds the settings that a head must be read with."""

from .diagnosis import Cell, Diagnosis, Reading, Tally
from .labelled_text import LabelledText, write_answers
from .probing import DEPTHS, diagnose
from .refinement import Source, refined


__all__ = [
    "DEPTHS",
    "LabelledText",
    "Cell",
    "Diagnosis",
    "Reading",
    "Source",
    "Tally",
    "diagnose",
    "refined",
    "write_answers",
]
