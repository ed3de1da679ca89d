"""Say what to do when a file of a run cannot be written, most often because the disk is full."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written(place: str | Path) -> Iterator[None]:
    """Inside, files of a run are written; PyTorch and safetensors raise errors of their own.

    Raises:
        OSError: names the place, the fault and the way on.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"Writing {place} failed: {fault}. Free disk space and start the run again with the same settings: it "
            "goes on from the newest complete checkpoint."
        ) from error
