"""The Hub that folders are published to, and a folder to publish."""

from tests.hub.conftest import folder, hub, pauses, pristine


__all__ = ["folder", "hub", "pauses", "pristine"]
