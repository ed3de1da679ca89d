"""Compiled code that outlives its process: what is loaded, what is refused, and that no fault costs more than time."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import HAS_COMPILER, NO_COMPILER, bytes_in_memory, mapped, needs_compiler, needs_instructions
from transformers_resps.compilation import native, packages
from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.engine import Code, CompileEngine, WeightFingerprint
from transformers_resps.compilation.kernels import VECTORS, Kernels
from transformers_resps.compilation.packages import FOLDER_VARIABLE, remove_packages, stored_packages


class Engine(CompileEngine[nn.Linear]):
    """Runs a linear layer over rows, and writes these to a buffer."""

    name, duration = "the layer", "A moment."

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner)

    @property
    def module(self) -> nn.Module:
        return self.owner

    def layer(self, rows: Tensor) -> tuple[dict[str, Any], Tensor] | None:
        """Its outputs, nested, and the buffer."""
        buffer = torch.zeros(20, 64)

        def function(rows: Tensor, buffer: Tensor) -> dict[str, Any]:
            buffer[: rows.shape[0]] = rows
            return {"sums": (self.owner(rows), None), "buffer": buffer.sum()}

        def make() -> Code:
            fast = CompiledFunction(function, [(0,)], (0,), packages=self.packages, name="layer")
            return Code(function, fast, lambda outputs: outputs["sums"][0], "outputs", torch.float32)

        found = self.run(self.code("layer", make), [rows], [buffer])
        return None if found is None else (found, buffer)


def build() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48).requires_grad_(False)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def run(layer: nn.Linear, count: int = 5) -> None:
    """Run as another process would, and compare with the layer."""
    engine = Engine()
    with engine.borrow(layer):
        for size in (count, count + 3):
            found = engine.layer(rows(size))
            assert found is not None and engine.obstacle is None
            outputs, buffer = found
            torch.testing.assert_close(outputs["sums"][0], layer(rows(size)))
            assert outputs["sums"][1] is None and torch.equal(buffer[:size], rows(size))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the one package that these tests compile."""
    if not HAS_COMPILER:
        pytest.skip(NO_COMPILER)
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        run(build())
    assert len(stored_packages(folder)) == 1
    return folder


@pytest.fixture
def compilations(compiled_once: Path, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were compiled: stands for a compiler, and gives what it once made."""
    found: list[nn.Module] = []
    [package] = stored_packages(compiled_once)
    manifest = json.loads((package.path / "package.json").read_text())

    def compile_again(module: nn.Module, job: packages.CompileJob, path: Path, bar: Any) -> dict[str, Any]:
        found.append(module)
        job.function(*job.tensors)
        path.write_bytes((package.path / "code.pt2").read_bytes())
        return {name: manifest[name] for name in ("codes", "calls", "outputs", "limits")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled for this process alone")

    monkeypatch.setattr(packages, "_compile", compile_again)
    monkeypatch.setattr(torch, "compile", refuse)
    return found


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said since the last call, but for that something is compiled."""

    def taken() -> list[str]:
        told = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
        caplog.clear()
        return [message for message in told if "Compiling the layer" not in message]

    caplog.set_level("INFO", "transformers")
    return taken


@pytest.fixture
def folder(
    compiled_once: Path, compilations: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder in which that package lies."""
    copied = shutil.copytree(compiled_once, tmp_path / "compiled")
    monkeypatch.setenv(FOLDER_VARIABLE, str(copied))
    return copied


def path_in(folder: Path) -> Path:
    [package] = stored_packages(folder)
    return package.path


def test_a_package_is_private_small_and_has_no_weights(compiled_once: Path) -> None:
    [package] = stored_packages(compiled_once)
    assert package.path.stat().st_mode & 0o077 == 0
    assert sorted(os.listdir(package.path)) == ["code.pt2", "package.json"]
    assert package.size < 4e6
    with zipfile.ZipFile(package.path / "code.pt2") as archive:
        stored = b"".join(archive.read(name) for name in archive.namelist())
    assert build().weight[0].numpy().tobytes() not in stored
    assert b"aoti_torch_cpu_bf16_linear" not in stored, "it calls none of our operators"
    assert json.loads((package.path / "package.json").read_text())["limits"] == []


class Reordered(TorchDispatchMode):
    """Counts how often weights are copied into oneDNN's layout."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reorder_linear_weight" in str(func)
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_codes_of_one_module_hold_its_weights_once_and_the_file_leaves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    weight = mapped(tmp_path, torch.randn(1024, 1024))
    layer = nn.Linear(1024, 1024, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    rows = torch.randn(5, 1024)

    def job(factor: float) -> packages.CompileJob:
        return packages.CompileJob(
            lambda rows: [layer(rows) * factor], [rows], [(0,)], {"freezing": True}, alike=False
        )

    compiler, later = (packages.ModulePackages(lambda: layer, "the layer") for _ in range(2))
    compiler.compile("one", "", job(1.0))
    compiler.compile("two", "", job(2.0))
    expected = layer(rows)
    read = bytes_in_memory(weight)
    with Reordered() as reordered:
        one = later.load("one", "")
        assert reordered.count == 1 and bytes_in_memory(weight) < 0.1 * read
        two = later.load("two", "")
        assert reordered.count == 1
    assert one is not None and two is not None
    torch.testing.assert_close(one(rows)[0], expected, atol=1e-3, rtol=0)  # sums of 1,024 products of about 1
    torch.testing.assert_close(two(rows)[0], 2 * expected, atol=2e-3, rtol=0)
    assert torch.equal(layer(rows), expected), "eager code reads the file again"


def graphs_with_weights() -> list[torch.fx.GraphModule]:
    gc.collect()
    graphs = [one for one in gc.get_objects() if isinstance(one, torch.fx.GraphModule)]
    return [one for one in graphs if [*one.parameters(), *one.buffers()]]


@needs_instructions
@needs_compiler
def test_packed_weights_leave_memory_with_the_last_code_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    layer = build().to(torch.bfloat16)
    monkeypatch.setattr(native, "chosen_kernels", lambda products, *, alike: Kernels.only(VECTORS))
    given = rows().to(torch.bfloat16)
    stored = packages.ModulePackages(lambda: layer, "the layer")
    job = packages.CompileJob(lambda rows: [layer(rows)], [given], [(0,)], {"freezing": True}, alike=False)
    before = {id(graph) for graph in graphs_with_weights()}
    one, two = stored.compile("one", "", job), stored.compile("two", "", job)
    assert before >= {id(graph) for graph in graphs_with_weights()}, "the compiler keeps weights"
    first, second = (
        [part.tensor for part in code._parts[0].constants if part.tensor.dim() == 4] for code in (one, two)
    )
    (constant,) = first
    assert second[0] is constant
    del one, first, second
    gc.collect()
    torch.testing.assert_close(two(given)[0], layer(given), atol=0.02, rtol=0.02)
    assert constant.untyped_storage().nbytes() >= layer.weight.nbytes
    del two
    gc.collect()
    assert constant.untyped_storage().nbytes() == 0 and layer.weight.untyped_storage().nbytes() > 0


def test_it_is_known_whether_code_lies_ready(folder: Path) -> None:
    layer = build()
    with Engine().borrow(layer) as engine:
        assert engine is not None and engine.packages.have("layer") and not engine.packages.have("another")
        remove_packages(stored_packages(folder))
        assert not engine.packages.have("layer")


def test_code_of_another_process_runs_for_all_sizes_without_a_word(
    folder: Path, compilations: list[nn.Module], warned: Callable[[], list[str]]
) -> None:
    for count in (5, 9):
        run(build(), count)
    assert not compilations and not warned()
    with torch.inference_mode():
        run(build())
    assert not compilations


def test_a_new_process_loads_it_and_compiles_nothing(folder: Path) -> None:
    script = (
        "import torch\n"
        "from tests.compilation import test_packages as other\n"
        "from transformers_resps.compilation import packages\n"
        "def refuse(*_, **__): raise SystemExit('something was compiled')\n"
        "packages._compile = torch.compile = refuse\n"
        "other.run(other.build())\n"
        "print('ran')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert (ran.returncode, ran.stdout) == (0, "ran\n"), ran.stderr


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def _change_a_byte(code: bytes) -> bytes:
    middle = len(code) // 2
    return code[:middle] + bytes([code[middle] ^ 1]) + code[middle + 1 :]


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another manifest, as a version of this library would write it."""

    def edit(path: Path) -> None:
        manifest = json.loads((path / "package.json").read_text())
        manifest.pop("seal")
        change(manifest)
        (path / "package.json").write_text(json.dumps(packages.sealed(manifest)))

    return edit


def _negate_the_bias(manifest: dict[str, Any]) -> None:
    bias = {"weight": "bias"}
    recipes = manifest["codes"][0]["recipes"]
    [name] = [name for name, recipe in recipes.items() if recipe == bias]
    recipes[name] = {"operator": "aten.neg.default", "arguments": [bias], "keywords": {}}


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_rewrite("code.pt2", lambda code: code[:1000]), "it is damaged"),
    "one byte": (_rewrite("code.pt2", _change_a_byte), "it is damaged"),
    "a manifest that is cut off": (_rewrite("package.json", lambda text: text[:50]), "it is damaged"),
    "no manifest": (lambda path: (path / "package.json").unlink(), "it is damaged"),
    "no code": (lambda path: (path / "code.pt2").unlink(), "it is damaged"),
    "one value of a manifest": (
        _rewrite("package.json", lambda text: text.replace(b'"bias"', b'"weight"')),
        "it is damaged",
    ),
    "another version": (_edit(lambda manifest: manifest["identity"].update(torch="1.0")), "made for other torch"),
    "another format": (_edit(lambda manifest: manifest.update(identity={}, codes=[])), "made for other"),
    "another user's": (lambda path: path.chmod(0o777), "another user may write it"),
    "constants that the code lacks": (
        _edit(lambda found: found["codes"][0]["recipes"].update(x={"weight": "bias"})),
        "x",
    ),
    "other values": (_edit(_negate_the_bias), "its outputs differ"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_compiled_again_after_one_warning(
    name: str, folder: Path, compilations: list[nn.Module], warned: Callable[[], list[str]]
) -> None:
    change, reason = FAULTS[name]
    change(path_in(folder))
    run(build())
    assert len(compilations) == 1
    [warning] = warned()
    assert reason in warning
    run(build())
    assert len(compilations) == 1 and not warned(), "the new package serves the next process"


def test_other_weights_are_not_taken_for_the_packaged_ones(folder: Path, compilations: list[nn.Module]) -> None:
    """A single value, which no sample of a few reaches: code might hold it as a number."""
    layer = build()
    layer.weight[40, 40] += 1.0
    run(layer)
    assert len(compilations) == 1
    layer.weight[0, 0] += 1.0
    run(layer)
    assert len(compilations) == 2


def test_a_model_in_another_folder_has_the_same_code(
    folder: Path, compilations: list[nn.Module], warned: Callable[[], list[str]]
) -> None:
    layer = build()
    layer.name_or_path = "where/it/has/moved"
    run(layer)
    assert not compilations and not warned()


def test_other_threads_settings_and_patched_modules_have_packages_of_their_own(
    folder: Path, compilations: list[nn.Module], monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        run(build())
    finally:
        torch.set_num_threads(before)
    with torch._inductor.config.patch(max_autotune=True):
        run(build())
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, rows: rows @ layer.weight.t() + layer.bias)
    run(build())
    monkeypatch.undo()
    assert len(compilations) == 3 and len(stored_packages(folder)) == 4 and not warned()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_takes_nothing_costs_a_warning(
    fault: int,
    tmp_path: Path,
    compilations: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "compiled"))
    monkeypatch.setattr(*((shutil, "copy", fail) if fault == errno.ENOSPC else (Path, "mkdir", fail)))
    run(build())
    [warning] = warned()
    assert os.strerror(fault) in warning and FOLDER_VARIABLE in warning
    assert len(compilations) == 1 and not [part for part in tmp_path.rglob("*") if part.is_file()]


def test_of_two_processes_that_compile_at_the_same_time_one_keeps_its_code(
    folder: Path, compilations: list[nn.Module], monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    """The other's package appears while this one's is compiled, or in the last moment."""
    path, aside = path_in(folder), folder.parent / "aside"
    stock, rename = packages._compile, Path.rename
    for moment in ("compiling", "renaming"):
        shutil.move(path, aside)

        def compile_slowly(*args: Any, moment: str = moment, **options: Any) -> Any:
            if moment == "compiling":
                shutil.move(aside, path)
            return stock(*args, **options)

        def rename_late(self: Path, target: Path, moment: str = moment) -> Path:
            if moment == "renaming":
                shutil.move(aside, path)
            return rename(self, target)

        monkeypatch.setattr(packages, "_compile", compile_slowly)
        monkeypatch.setattr(Path, "rename", rename_late)
        run(build())
        assert path_in(folder) == path and os.listdir(path.parent) == [path.name]
    assert len(compilations) == 2 and not warned()


@pytest.mark.parametrize(("demanded", "ours"), [(None, ("avx512_bf16", "amx_bf16")), ("avx512_bf16", ()), (None, ())])
def test_code_of_other_kernels_is_not_taken(
    demanded: str | None,
    ours: tuple[str, ...],
    folder: Path,
    compilations: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of tiles, on a machine or in a process without them."""
    known = demanded or ", ".join(ours)
    monkeypatch.setattr(packages, "demanded_kernel", lambda: demanded)
    monkeypatch.setattr(packages, "our_kernels", lambda: ours)
    monkeypatch.setattr(packages, "_about_here", packages._about_here.__wrapped__)
    is_known = json.loads((path_in(folder) / "package.json").read_text())["identity"]["kernels"] == known
    run(build())
    assert len(compilations) == (0 if is_known else 1)


def test_without_a_folder_code_ends_with_its_process(
    compilations: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    for off in ("0", "off", ""):
        monkeypatch.setenv(FOLDER_VARIABLE, off)
        run(build())
    assert len(compiled) == 3 and not compilations


def test_what_cannot_be_packaged_is_compiled_for_this_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warned: Callable[[], list[str]]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise packages.PackagingError("a constant that is none of the weights")

    compiled = []
    monkeypatch.setattr(packages, "_compile", fail)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    remove_packages(stored_packages(folder))
    run(build())
    assert len(compiled) == 1
    assert warned() == ["Compiled code of layer ends with this process: a constant that is none of the weights"]


def test_the_last_packages_are_kept(
    folder: Path, compilations: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "KEPT", 2)
    first = path_in(folder)
    os.utime(first, (0, 0))
    for change in (1.0, 2.0):
        layer = build()
        layer.weight[0, 0] += change
        run(layer)
    assert len(stored_packages(folder)) == 2 and not first.exists()
    remove_packages(stored_packages(folder))
    assert not list(folder.iterdir())
