"""The doctor: does a head read its target as it was trained to, and if not, what is to be corrected."""

from .answers import Answer, write_answers
from .diagnosis import Cell, Diagnosis, Reading, Tally
from .probing import DEPTHS, diagnose


__all__ = ["DEPTHS", "Answer", "Cell", "Diagnosis", "Reading", "Tally", "diagnose", "write_answers"]
