"""The doctor: finds the settings that a head must be read with."""

from .answers import Answer, write_answers
from .diagnosis import Cell, Diagnosis, Reading, Tally
from .probing import DEPTHS, diagnose


__all__ = ["DEPTHS", "Answer", "Cell", "Diagnosis", "Reading", "Tally", "diagnose", "write_answers"]
