"""Downloads from and uploads to the Hub."""

from .download import RepositoryFiles, file_of, folder_of
from .upload import (
    CARD,
    GENERAL_TAGS,
    METRICS,
    RESULTS,
    Destination,
    Existing,
    as_hub_id,
    card_data,
    make_repository,
    plain_card,
    push_saved,
    shareable,
    upload,
)


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
