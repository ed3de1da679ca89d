"""The only code that is published: the folder `custom_generate/`, which calls this package."""

from pathlib import Path


CUSTOM_GENERATE = "custom_generate"
_OURS = Path(__file__).parent / CUSTOM_GENERATE
_FILES = ("generate.py", "requirements.txt")


def custom_generate_files() -> dict[str, bytes]:
    """Path in the repository -> content."""
    return {f"{CUSTOM_GENERATE}/{name}": (_OURS / name).read_bytes() for name in _FILES}


def is_ours(folder: Path, file: Path) -> bool:
    """Whether a file below `folder` equals one of them, byte for byte."""
    return custom_generate_files().get(file.relative_to(folder).as_posix()) == file.read_bytes()
