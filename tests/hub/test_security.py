"""Loading runs no code, leaves its folder for nothing, and asks no shell; read off the source, and tried."""

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from tests.test_architecture import nodes_of
from transformers_resps import AutoPolicy, CostTable, DraftHead, FixedPolicy, TreeShape


PACKAGE = Path(__file__).parents[2] / "transformers_resps"
FILES = sorted(PACKAGE.rglob("*.py"))
# Modules that run code, or other programs, from what they read.
FORBIDDEN_IMPORTS = {"subprocess", "shelve", "marshal", "dill", "cloudpickle", "joblib", "runpy", "pty", "ctypes"}
# Native code: functions of libc, which is loaded anyhow, packages that this library wrote and sealed, and its own C++,
# which it compiles into a folder of its own and loads from there. Another Python runs a command of this package.
COMPILES = "compilation/kernels.py"
ALLOWED = {
    "compilation/beside.py": {"subprocess"},
    "compilation/pages.py": {"ctypes"},
    "compilation/packages.py": {"torch._C._aoti.AOTIModelPackageLoader"},
    COMPILES: {"ctypes", "subprocess"},
}
FORBIDDEN_CALLS = {
    "torch._C._aoti.AOTIModelPackageLoader",
    "torch._inductor.aoti_load_package",
    "eval",
    "exec",
    "compile",
    "__import__",
}
FORBIDDEN_METHODS = {"os.system", "os.popen", "os.execv", "os.spawnv", "pickle.load", "pickle.loads", "yaml.load"}
FORBIDDEN_METHODS |= {"torch.hub", "importlib.import_module", "builtins.eval", "builtins.exec"}


def calls(file: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """Line and dotted name of every call."""
    for node in nodes_of(file):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_no_file_of_the_package_runs_what_it_reads() -> None:
    for file in FILES:
        allowed = ALLOWED.get(str(file.relative_to(PACKAGE)), set())
        for node in nodes_of(file):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = (FORBIDDEN_IMPORTS - allowed) & {name.split(".")[0] for name in names}
            assert not found, f"{file} imports {found}"
        for line, name, call in calls(file):
            assert name not in (FORBIDDEN_CALLS | FORBIDDEN_METHODS) - allowed, f"{file}, line {line}: {name}"
            loads = "str(made)" if str(file.relative_to(PACKAGE)) == COMPILES else "None"
            assert name != "ctypes.CDLL" or ast.unparse(call.args[0]) == loads, f"{file}, line {line}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("shell") != "True", f"{file}, line {line}"
            assert keywords.get("trust_remote_code", "False") == "False", f"{file}, line {line}"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{file}, line {line}: `weights_only=True` is missing"


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return Architecture("llama").build("sdpa")


POISONED = ["model.safetensors", "config.json", "pytorch_model.bin", "policy.pkl", "training_args.bin"]


@pytest.mark.parametrize("name", POISONED)
def test_a_pickle_under_any_name_is_never_run(name: str, target: PreTrainedModel, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    DraftHead.from_target(target, 16).save_pretrained(tmp_path / "head")
    FixedPolicy(TreeShape(8, 3, 2)).save_pretrained(tmp_path / "policy")
    loads: dict[str, Callable[[Path], Any]] = {
        "head": lambda folder: DraftHead.from_pretrained(folder, target=target),
        "policy": AutoPolicy.from_pretrained,
    }
    for kind, load in loads.items():
        (tmp_path / kind / name).write_bytes(pickle.dumps(Trap(trap)))
        if name == "pytorch_model.bin" and kind == "head":
            (tmp_path / kind / "model.safetensors").unlink()
        try:
            load(tmp_path / kind)
        except ValueError as error:
            assert ". " in str(error)
        assert not trap.exists()
    (tmp_path / "costs.json").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="no cost table"):
        CostTable.load(tmp_path / "costs.json")
    assert not trap.exists()
    (tmp_path / "costs.json").write_bytes(b"\xff" * 100_000)
    with pytest.raises(ValueError, match="no cost table") as refusal:
        CostTable.load(tmp_path / "costs.json")
    assert len(str(refusal.value)) < 1000


def test_the_trap_would_have_been_noticed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


def test_code_that_a_config_names_is_not_loaded(target: PreTrainedModel, tmp_path: Path) -> None:
    """`auto_map` and a `modeling_*.py` beside the weights: what `trust_remote_code` would run."""
    head = DraftHead.from_target(target, 16)
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.DraftHead", "AutoConfig": "modeling_evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'it-ran')!r}).touch()\n")
    loaded = DraftHead.from_pretrained(tmp_path, target=target)
    assert not (tmp_path / "it-ran").exists()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "file:///etc/passwd", "~/.ssh/id_rsa"])
def test_a_policy_type_is_a_name_and_never_a_path(path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"policy_type": path, "shape": [8, 3, 2, 0]}))
    with pytest.raises(ValueError, match="but this release knows"):
        AutoPolicy.from_pretrained(tmp_path)


def test_the_repositorys_recipes_unpickle_nothing() -> None:
    for file in sorted((PACKAGE.parent / "training").rglob("*.py")):
        for line, name, call in calls(file):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in {"pickle.load", "pickle.loads", "eval", "exec"}, f"{file}, line {line}"
            assert name != "torch.load" or keywords.get("weights_only") == "True", f"{file}, line {line}"
