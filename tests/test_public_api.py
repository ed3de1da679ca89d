"""What users may rely on: names, their docs, and an import that does nothing else."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_resps
from transformers_resps import DraftHeadConfig

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


def test_all_public_names_are_listed_and_an_unknown_one_is_no_attribute() -> None:
    assert set(dir(transformers_resps)) >= set(transformers_resps.__all__)
    names: dict[str, object] = {}
    exec("from transformers_resps import *", names)
    assert set(transformers_resps.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="has no attribute 'Guard'"):
        transformers_resps.__getattr__("Guard")


def test_the_version_is_kept_in_one_place() -> None:
    sources = (ROOT / "transformers_resps").rglob("*.py")
    assert not [file for file in sources if "__version__ =" in file.read_text(encoding="utf-8")]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_import_loads_nothing_and_leaves_logging_alone() -> None:
    run("""
import logging, sys
import torch, transformers
before, handlers = set(sys.modules), list(logging.getLogger().handlers)
import transformers_resps
assert set(sys.modules) - before == {"transformers_resps"}, set(sys.modules) - before
assert logging.getLogger().handlers == handlers
""")


def test_a_name_loads_no_optional_dependency_and_no_room_below_its_own() -> None:
    run("""
import sys
from transformers_resps import DraftHead, attach
optional = {"trl", "peft", "datasets", "rich", "matplotlib", "gguf"}
rooms = {f"transformers_resps.{name}" for name in ("calibration", "testing", "data", "replay", "trainers")}
assert not (optional | rooms) & sys.modules.keys(), (optional | rooms) & sys.modules.keys()
""")


def test_the_auto_classes_know_a_head_once_a_name_that_works_with_heads_is_used(tmp_path: Path) -> None:
    DraftHeadConfig().save_pretrained(tmp_path)
    run(f"""
import transformers_resps
from transformers import AutoConfig, AutoModel
transformers_resps.attach
config = AutoConfig.from_pretrained({str(tmp_path)!r})
assert type(config) is transformers_resps.DraftHeadConfig
assert type(AutoModel.from_config(config)) is transformers_resps.DraftHead
""")


def test_python_blocks_of_the_first_page_use_public_names_only() -> None:
    _, *blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block.partition("```")[0])):
            if isinstance(node, ast.ImportFrom) and node.module == "transformers_resps":
                assert {alias.name for alias in node.names} <= set(transformers_resps.__all__)


def test_the_map_for_contributors_names_every_module() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)/?`", page))
    assert not [name for name in MAY_IMPORT if name != "__init__" and name not in listed]
