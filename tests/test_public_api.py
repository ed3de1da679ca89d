"""What users may rely on: names, their docs, and an import that does nothing else."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_resps

from .test_architecture import MAY_IMPORT


ROOT = Path(__file__).parent.parent
PROMISED = {
    "attach",
    "detach",
    "DraftHead",
    "DraftHeadConfig",
    "FixedPolicy",
    "Policy",
    "SpeculationReport",
    "StepRecord",
    "TreeShape",
}


def test_the_promised_names_are_public() -> None:
    assert set(transformers_resps.__all__) >= PROMISED
    assert list(transformers_resps.__all__) == sorted(transformers_resps.__all__)


@pytest.mark.parametrize("name", transformers_resps.__all__)
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(transformers_resps, name))


def test_names_of_version_0_1_still_import() -> None:
    from transformers_resps import BaselineGuard, Guard, pack, prepack, unpack, unprepack

    assert (Guard, pack, unpack) == (BaselineGuard, prepack, unprepack)


def test_the_version_is_kept_in_one_place() -> None:
    sources = (ROOT / "transformers_resps").rglob("*.py")
    assert not [file for file in sources if "__version__ =" in file.read_text(encoding="utf-8")]


def test_an_import_loads_no_optional_dependency_and_leaves_logging_alone() -> None:
    code = """
import logging, sys
before = list(logging.getLogger().handlers)
import transformers_resps
optional = {"trl", "peft", "datasets", "rich", "matplotlib", "gguf", "transformers_resps.trainers"}
assert not optional & sys.modules.keys(), optional & sys.modules.keys()
assert logging.getLogger().handlers == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_of_the_pages_use_public_names_only(page: str) -> None:
    blocks = (ROOT / page).read_text(encoding="utf-8").split("```python\n")[1:]
    for block in blocks:
        for node in ast.walk(ast.parse(block.partition("```")[0])):
            if isinstance(node, ast.ImportFrom) and node.module == "transformers_resps":
                assert {alias.name for alias in node.names} <= set(transformers_resps.__all__)


def test_the_map_for_contributors_names_every_module() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)/?`", page))
    assert not [name for name in MAY_IMPORT if name != "__init__" and name not in listed]
