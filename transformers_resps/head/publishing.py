"""Publishing a head on the Hub."""

from typing import Any

from transformers import PreTrainedModel

from ..hub import Destination, plain_card, push_saved
from .configuration import DraftHeadConfig


class PublishableHead(PreTrainedModel):
    """A head that is pushed with the metadata by which the Hub lists it on its target's page."""

    config: DraftHeadConfig

    def push_to_hub(  # type: ignore[override]  # one commit with metadata; the options that matter for a head
        self, repo_id: str, *, commit_message: str = "Upload DraftHead", **where: Any
    ) -> str:
        """Publish the head on the Hub in one commit, with a plain model card if there is none.

        Args:
            repo_id: the repository; made if missing.
            commit_message: subject of the commit.
            where: `private`, `token`, `revision` and `create_pr`, see `Destination`.

        Returns:
            The address of the commit.

        Raises:
            OSError: the Hub refused, or the connection broke; nothing was committed.
        """
        card = self.plain_card(repo_id)
        return push_saved(self.save_pretrained, card, Destination(repo_id, **where), commit_message)

    def plain_card(self, repo_id: str) -> str:
        """A card for a repository that has none: what it is, its target, and how to load it."""
        use = f'head = DraftHead.from_pretrained("{repo_id}", target=model)'
        return plain_card("draft head", "draft-head", (self.config.target or {}).get("name_or_path"), use)
