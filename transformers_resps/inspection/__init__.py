"""One call of `generate`, recorded and written as an HTML page."""

from .examination import Examination, examine
from .facts import facts_of
from .page import page
from .recorder import RecordedStep, Recorder
from .story import story_of


__all__ = ["Examination", "RecordedStep", "Recorder", "examine", "facts_of", "page", "story_of"]
