"""The doctor finds the settings that a head must be read with."""

from .diagnosis import Cell, Diagnosis, Reading, Tally
from .labelled_text import LabelledText, write_answers
from .probing import DEPTHS, diagnose


__all__ = ["DEPTHS", "LabelledText", "Cell", "Diagnosis", "Reading", "Tally", "diagnose", "write_answers"]
