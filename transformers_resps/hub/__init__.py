"""What we take from and give to the Hub. Knows repositories and files: nothing of heads or policies."""

from .download import RepositoryFiles
from .metadata import GENERAL_TAGS, as_hub_id, front_matter
from .pushing import plain_card, push_saved
from .upload import Destination, make_repository, upload


__all__ = [
    "GENERAL_TAGS",
    "Destination",
    "RepositoryFiles",
    "as_hub_id",
    "front_matter",
    "make_repository",
    "plain_card",
    "push_saved",
    "upload",
]
