"""Records one call of `generate` and writes it as an HTML page."""

from .examination import Examination, examine
from .facts import facts_of
from .page import page
from .page_data import page_data
from .recorder import RecordedStep, Recorder


__all__ = ["Examination", "RecordedStep", "Recorder", "examine", "facts_of", "page", "page_data"]
