"""The only code that is published: the folder `custom_generate/`, which calls this package."""

from collections.abc import Iterable
from pathlib import Path

from .artefact import Artefact, UnreadableArtefactError, read_artefact


CUSTOM_GENERATE = "custom_generate"
_OURS = Path(__file__).parent / CUSTOM_GENERATE
_CODE, _REQUIREMENTS = "generate.py", "requirements.txt"


def custom_generate_files(artefact: Artefact, name: str) -> dict[str, bytes]:
    """Return the files by their paths in the repository; the code decodes with `from_pretrained(name)` by default."""
    head, policy = (artefact.head, name) if artefact.is_policy else (name, "auto")
    code = (_OURS / _CODE).read_text(encoding="utf-8")
    for constant, value in (("HEAD", head), ("POLICY", policy)):
        code = code.replace(f"{constant}: str | None = None\n", f"{constant}: str | None = {_literal(value)}\n")
    return {
        f"{CUSTOM_GENERATE}/{_CODE}": code.encode(),
        f"{CUSTOM_GENERATE}/{_REQUIREMENTS}": (_OURS / _REQUIREMENTS).read_bytes(),
    }


def _literal(value: str | None) -> str:
    return "None" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def is_ours(folder: Path, file: Path, names: Iterable[str]) -> bool:
    """Return whether a file below `folder` equals, byte for byte, one that is written for one of the `names`."""
    try:
        artefact = read_artefact(folder)
    except UnreadableArtefactError:
        return False
    path, content = file.relative_to(folder).as_posix(), file.read_bytes()
    return any(custom_generate_files(artefact, name).get(path) == content for name in names)
