"""Downloads from and uploads to the Hub."""

from .download import RepositoryFiles
from .loaded import file_of, folder_of
from .metadata import GENERAL_TAGS, as_hub_id, card_data, shareable
from .pushing import CARD, METRICS, RESULTS, plain_card, push_saved
from .upload import Destination, Existing, make_repository, upload


__all__ = [
    "CARD",
    "GENERAL_TAGS",
    "METRICS",
    "RESULTS",
    "Destination",
    "Existing",
    "RepositoryFiles",
    "as_hub_id",
    "card_data",
    "file_of",
    "folder_of",
    "make_repository",
    "plain_card",
    "push_saved",
    "shareable",
    "upload",
]
