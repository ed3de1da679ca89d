"""With what code and what weights something was measured: what is needed to repeat it."""

import ast
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any, cast

import transformers_resps
from transformers_resps.hub.download import folder_of


PACKAGE = Path(transformers_resps.__file__).parent
_CONFIG = "config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", _CONFIG)  # the first kind that is there, all its parts
_UNTOLD = {"default_tree", "transformers_version", "name_or_path"}  # says nothing of how weights are used


def code() -> dict[str, Any]:
    """Return the commit that the package runs from, whether its files differ from it, and a hash of what they do.

    Outside a checkout `commit` is `None` and `dirty` is false.
    """
    commit = _git("ls-files", "--error-unmatch", "__init__.py") and _git("rev-parse", "HEAD")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"commit": commit, "dirty": bool(changed), "code_sha256": code_sha256(PACKAGE)}


def code_sha256(package: Path) -> str:
    """Hash the Python of a package as its syntax trees, so that comments and docstrings may change, and its C++."""
    files = hashlib.sha256()
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.cpp")]):
        does = file.read_text(encoding="utf-8") if file.suffix == ".cpp" else _syntax(_undocumented(file))
        files.update(f"{file.relative_to(package)}\n{does}\n".encode())
    return files.hexdigest()


def _syntax(node: Any) -> str:
    """Write a syntax tree in words, alike under every Python: fields that a release adds are empty in older code."""
    if isinstance(node, list):
        return f"[{', '.join(map(_syntax, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    told = (f"{name}={_syntax(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({', '.join(told)})"


def _undocumented(file: Path) -> ast.Module:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_body and ast.get_docstring(cast(ast.Module, node), clean=False) is not None:
            del cast(ast.Module, node).body[0]
    return tree


def weights_sha256(id_or_folder: str | Path) -> str | None:
    """Hash the file of the weights, or all their files; where there are none, `config.json`, or else `None`."""
    folder = folder_of(id_or_folder)
    if folder is None:
        return None
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)), None)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)  # goes on with the same one
    return digest.hexdigest()


def config_sha256(id_or_folder: str | Path) -> str | None:
    """Hash what `config.json` says about the use of the weights, whatever its layout; `None` where there is none.

    Without `default_tree`: the benchmark passes every tree, and the best of them becomes the default afterwards; and
    without names of targets and heads, which differ from machine to machine.
    """
    folder = folder_of(id_or_folder)
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    told = json.loads(
        (folder / _CONFIG).read_text(encoding="utf-8"),
        object_hook=lambda values: {name: value for name, value in values.items() if name not in _UNTOLD},
    )
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", PACKAGE, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
