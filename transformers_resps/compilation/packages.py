"""Keep compiled code for later processes, as packages in the user's cache folder.

A package holds no weights, so it takes only a few megabytes. It holds recipes, by which the process that loads it
makes the code's constants from a module's weights.

A package is native code. It is loaded only if its folder belongs to this user and is not writable by other users, if
its bytes are unchanged, and if weights, modules, settings, machine and versions are still the same.
"""

import gc
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import Argument
from transformers.utils.logging import tqdm

from .few_bits import exposed, has_few_bits, named_weights
from .kernels import demanded_kernel, native_object, our_kernels
from .native import has_usual_layers, native_operators, use_native
from .pages import collapse, release
from .parts import ProgramPart, UncuttableError, exported_part, parts_of, weight_names


logger = logging.getLogger(f"transformers.{__name__}")

FOLDER_VARIABLE = "RESPS_COMPILED_CODE"  # Environment variable: another folder, or 0 to keep no packages.
KEPT = 20  # Maximum number of packages; the least recently used one is removed first.

_FORMAT = 2
# Files of this library whose code may be in packages. After a change in any other file, packages stay valid.
_TRACED = ("compat.py", "compilation", "drafting", "heads", "tree.py", "verifying")
_CODE, _MANIFEST = "code.pt2", "package.json"
_LINKED = "LIBRARY_PATH"  # Environment variable of GCC and Clang: folders where the linker looks.
_NAME_LENGTH = 24  # Hexadecimal digits of a digest.
_IN_WORDS = "model"  # Key of a module's name. The name need not match, since the same module may have another name.
_LAYERS_OF_A_PART = 6  # Most layers to compile together: more gain nothing, and take memory while compiling.
_SAMPLED = 4  # Values of each weight that a folder's name depends on; the manifest has a digest of all values.
_compiling = Lock()  # Held while compiling, since Inductor's settings and its constant folding are global.

_Json: TypeAlias = Any  # a value that JSON can hold
_Manifest: TypeAlias = dict[str, _Json]


class PackagingError(RuntimeError):
    """Compiled code cannot be stored for later processes."""


class UnfitPackageError(RuntimeError):
    """A package is damaged, or was made for another module, machine or setting, and must not be loaded."""


def packages_folder() -> Path | None:
    """Return the folder for packages: `RESPS_COMPILED_CODE`, or one in Hugging Face's cache; `None` to store none."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is None:
        return Path(HF_HOME) / "transformers-resps" / "compiled"
    return None if chosen.lower() in ("", "0", "off", "no", "false") else Path(chosen).expanduser()


@dataclass(frozen=True, slots=True)
class StoredPackage:
    """One package on disk."""

    path: Path  # its folder
    model: str  # name of the model whose code it is
    code: str  # name of the model's function
    size: int  # bytes
    used: float  # time of the last use, in seconds since the epoch


def stored_packages(folder: Path) -> list[StoredPackage]:
    """List all packages in a folder, the most recently used first. A damaged one has "damaged" as its `model`."""
    packages = []
    for path in folder.glob("*/*"):
        about = (_manifest(path) or {}).get("identity", {})
        try:
            size, used = sum(part.stat().st_size for part in path.iterdir()), path.stat().st_mtime
        except OSError:  # another process has removed it meanwhile
            continue
        packages.append(StoredPackage(path, about.get("model", "damaged"), about.get("code", ""), size, used))
    return sorted(packages, key=lambda package: -package.used)


def remove_packages(packages: Sequence[StoredPackage]) -> None:
    """Remove packages from the disk, and folders that are then empty."""
    for package in packages:
        shutil.rmtree(package.path, ignore_errors=True)
        with suppress(OSError):  # the folder is not empty
            package.path.parent.rmdir()


@dataclass(frozen=True)
class CompileJob:
    """A function to compile, and the options for it."""

    function: Callable[..., Sequence[Tensor]]
    tensors: Sequence[Tensor]  # an example of its arguments
    dynamic: Sequence[Sequence[int]]  # for each argument, the dimensions whose sizes may change
    config: Mapping[str, _Json]  # inductor's settings
    alike: bool  # whether a row's result must not depend on other rows, not even in its last bits
    bits: int = 16  # number of bits to which bf16 weights are rounded, if our kernels can read such weights


class ModulePackages:
    """Compiles, stores and loads code of one module, with the module's weights as constants.

    `module()` returns the module when code is compiled or loaded, so that this object does not keep the module alive.
    `name` is the module's name in warnings.
    """

    def __init__(self, module: Callable[[], nn.Module], name: str) -> None:
        self._module, self._name, self._constants = module, name, _Constants()
        self._about = _about(module())  # read now: running code changes names of attention in configs

    @property
    def hold_few_bits(self) -> bool:
        """Whether the module has quantized weights, which only packaged code reads."""
        return has_few_bits(self._module())

    @property
    def identity(self) -> str:
        """Digest of all that code depends on: architecture, settings, machine, versions and weights' first values."""
        return _digest_of({name: value for name, value in self._about.items() if name != _IN_WORDS})

    def have(self, code: str) -> bool:
        """Whether a package of the function named `code` is stored, for any sizes."""
        folder = packages_folder()
        paths = [] if folder is None else (folder / self.identity).glob("*")
        return any((_manifest(path) or {}).get("identity", {}).get("code") == code for path in paths)

    def load(self, code: str, setting: str) -> "PackagedCode | None":
        """Load the code that `compile` stored as `code` and `setting`, or return `None`; remove an unfit package."""
        path = self._path(code, setting)
        if path is None or not path.is_dir():
            return None
        try:
            loaded = PackagedCode(path, self._identity(code, setting), self._module(), self._constants)
            os.utime(path)
        except (RuntimeError, OSError) as fault:
            self.discard(code, setting, str(fault).splitlines()[0])
            return None
        return loaded

    def discard(self, code: str, setting: str, reason: str) -> None:
        """Remove the package that `compile` stored as `code` and `setting`, and log the `reason` as a warning."""
        path = self._path(code, setting)
        assert path is not None
        logger.warning(f"Stored code of {self._name} is not used and compiled again: {reason} ({path}).")
        shutil.rmtree(path, ignore_errors=True)

    def compile(self, code: str, setting: str, job: CompileJob) -> "PackagedCode":
        """Compile a function, store its package under the name `code`, and return the loaded code.

        `setting` describes the caller's sizes and settings. If the package cannot be written, this only logs a
        warning. Raises a `PackagingError` if the code limits sizes of other tensors than inputs, or has constants not
        made from weights.
        """
        identity = self._identity(code, setting)
        about = f"Compiling {self._name}"
        with (
            tempfile.TemporaryDirectory(prefix="resps-") as folder,
            tqdm(total=2, desc=about, unit="part", disable=None, leave=False) as bar,
        ):
            path = Path(folder)
            made = _compile(self._module(), job, path / _CODE, bar)
            gc.collect()  # the compiler's graphs hold copies of weights, and refer to each other
            manifest = {"identity": identity, **made, "digest": _digest_of_file(path / _CODE)}
            (path / _MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
            loaded = PackagedCode(path, identity, self._module(), self._constants)
            self._keep(path, code, setting)
        return loaded

    def _keep(self, made: Path, code: str, setting: str) -> None:
        """Copy the package `made` to the packages folder atomically: other processes see all of it or nothing."""
        path = self._path(code, setting)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(prefix=".", dir=path.parent, ignore_cleanup_errors=True) as partial:
                for part in made.iterdir():
                    shutil.copy(part, partial)
                try:
                    Path(partial).rename(path)
                except OSError:
                    if not path.is_dir():  # if it exists, another process was faster
                        raise
            remove_packages(stored_packages(path.parent.parent)[KEPT:])
        except OSError as fault:
            logger.warning(
                f"The compiled code of {self._name} cannot be kept, and the next process will compile it again: "
                f"{fault}. Set {FOLDER_VARIABLE} to another folder, or to 0 to keep none."
            )

    def _identity(self, code: str, setting: str) -> dict[str, str]:
        return self._about | {"code": code, "setting": setting, "weights": self._weights}

    def _path(self, code: str, setting: str) -> Path | None:
        folder = packages_folder()
        return None if folder is None else folder / self.identity / _digest_of({"code": code, "setting": setting})

    @cached_property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for name, weight in named_weights(self._module()).items():
            digest.update(name.encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class _LoadedPart(NamedTuple):
    """The loaded code of one part of a program."""

    run: Callable[[list[Tensor]], list[Tensor]]
    inputs: list[int]  # indices into the program's inputs, followed by the outputs of all earlier parts
    constants: list["_Constant"]  # kept alive, since the code reads them at their addresses


class PackagedCode:
    """Loads and runs the code of a package, with `constants` made from the weights of `module`.

    Frees the weights' memory if they are mapped from a file, see `release`. Raises an `UnfitPackageError` if the
    package is damaged, is writable by another user, or has another `identity`.
    """

    def __init__(self, path: Path, identity: dict[str, str], module: nn.Module, constants: "_Constants") -> None:
        status = path.stat()
        if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise UnfitPackageError("another user may write it")
        manifest = _manifest(path)
        if manifest is None:
            raise UnfitPackageError("it is damaged")
        made_for = manifest["identity"] | {_IN_WORDS: identity[_IN_WORDS]}
        different = [name for name, value in identity.items() if made_for.get(name) != value]
        if different:
            raise UnfitPackageError(f"it was made for other {' and '.join(different)}")
        if _digest_of_file(path / _CODE) != manifest["digest"]:
            raise UnfitPackageError("it is damaged")
        weights = named_weights(module)
        self._parts: list[_LoadedPart] = []
        with tempfile.TemporaryDirectory(prefix="resps-") as folder:  # Loaded code needs no files.
            with zipfile.ZipFile(path / _CODE) as archive:
                archive.extractall(folder)
            for call in manifest["calls"]:
                recipes = _renamed(manifest["codes"][call["code"]]["recipes"], call["weights"])
                own = {name: constants.made(recipe, weights) for name, recipe in recipes.items()}
                loader = _loader(Path(folder) / str(call["code"]))
                tensors = {name: constant.tensor for name, constant in own.items()}
                # The flags mean: use the active buffer, expect all constants, make no copies.
                loader.load_constants(tensors, False, True, True)
                collapse(tensors.values())
                release(weights[name] for name in call["weights"].values())
                self._parts.append(_LoadedPart(loader.boxed_run, call["inputs"], [*own.values()]))
        self._outputs: list[int] = manifest["outputs"]
        self._limits = [tuple(map(int, limit)) for limit in manifest["limits"]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the code can run with tensors of these sizes."""
        return all(least <= tensors[place].shape[index] <= most for place, index, least, most in self._limits)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        values = [*tensors]
        for run, inputs, _ in self._parts:
            values += run([values[place] for place in inputs])
        return [values[place] for place in self._outputs]


def _loader(path: Path) -> "torch._C._aoti.AOTIModelPackageLoader":
    """Load the code at `path` for one caller at a time. PyTorch's `aoti_load_package` would run a C++ compiler."""
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)


def _compile(module: nn.Module, job: CompileJob, path: Path, bar: Any) -> _Manifest:
    """Compile the function of `job`, write its code to `path`, return its manifest entries; `bar` shows progress."""
    sizes = tuple(
        {dimension: torch.export.Dim.DYNAMIC for dimension in changing if part.shape[dimension] > 1}
        for part, changing in zip(job.tensors, job.dynamic, strict=True)
    )
    with _compiling, torch.inference_mode(False), torch.no_grad(), exposed(module):
        weights = named_weights(module)
        release(weights.values())  # eager code has read all of them
        wrapped, example = _Program(module, job.function), tuple(part.clone() for part in job.tensors)
        program = torch.export.export(wrapped, example, dynamic_shapes=(sizes,), strict=False)
        bar.update()
        writer = _Writer(path, job)
        try:
            parts = parts_of(program, _LAYERS_OF_A_PART if has_usual_layers(program) else 1)
            return writer.write_parts(program, parts, weights, bar)
        except UncuttableError:  # A new archive replaces the one that may hold some parts.
            return writer.write_whole(program, weights)
        finally:  # PyTorch keeps the graph of the latest export, and with it packed weights: let it keep an empty one.
            torch.export.export(nn.Identity(), (torch.zeros(1),), strict=False)


@dataclass(frozen=True)
class _Writer:
    """Compiles one program and writes its code into the archive `path`."""

    path: Path
    job: CompileJob

    def write_whole(self, program: ExportedProgram, weights: Mapping[str, Tensor]) -> _Manifest:
        with zipfile.ZipFile(self.path, "w") as archive:
            code, limits = self.write_code(program, weights, archive, 0)
        inputs, outputs = len(_inputs(program)), len(program.graph_signature.user_outputs)
        call = {"code": 0, "inputs": list(range(inputs)), "weights": {name: name for name in weights}}
        return {"codes": [code], "calls": [call], "outputs": list(range(inputs, inputs + outputs)), "limits": limits}

    def write_parts(
        self, program: ExportedProgram, parts: Sequence[ProgramPart], weights: Mapping[str, Tensor], bar: Any
    ) -> _Manifest:
        """Compile and write all parts of a program, equal parts only once; return the manifest entries."""
        bar.total = 1 + len({part.likeness for part in parts})
        places = {node: place for place, node in enumerate(_inputs(program))}
        sizes = {
            str(size): (place, at) for node, place in places.items() for at, size in enumerate(node.meta["val"].shape)
        }
        names, numbers = weight_names(program), dict[str, int]()
        codes, calls, limits = [], [], []
        with zipfile.ZipFile(self.path, "w") as archive:
            for part in parts:
                own = {f"w{number}": names[node.name].partition(".")[2] for number, node in enumerate(part.weights)}
                if part.likeness not in numbers:
                    number = numbers[part.likeness] = len(numbers)
                    of_part = {name: weights[given] for name, given in own.items()}
                    code, limited = self.write_code(exported_part(program, part), of_part, archive, number)
                    codes.append(code)
                    bar.update()
                    for place, at, least, most in limited:
                        size = str(part.inputs[place].meta["val"].shape[at])
                        if size not in sizes:
                            raise UncuttableError(f"a limit that is no input's: {size}")
                        limits.append([*sizes[size], least, most])
                inputs = [places[node] for node in part.inputs]
                calls.append({"code": numbers[part.likeness], "inputs": inputs, "weights": own})
                places |= {node: len(places) + number for number, node in enumerate(part.outputs)}
        outputs = [places[node] for node in program.graph.output_node().args[0]]
        return {"codes": codes, "calls": calls, "outputs": outputs, "limits": limits}

    def write_code(
        self, program: ExportedProgram, weights: Mapping[str, Tensor], archive: zipfile.ZipFile, number: int
    ) -> tuple[_Manifest, list[list[int]]]:
        """Compile a program, and write its code into the folder `number` of the archive.

        Return the code's manifest entry (recipes of constants, names of kernels), and the result of `_limits`.
        """
        kernels, recipes = use_native(program, alike=self.job.alike, bits=self.job.bits), _Recipes(weights)
        operators = native_operators()
        calls_ours = any(node.target in operators for node in program.graph.nodes)
        linked = [native_object()] if calls_ours else []
        with tempfile.TemporaryDirectory(prefix="resps-") as folder, recipes.noted(), _found_by_linkers(linked):
            path = Path(folder) / _CODE
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={
                    **self.job.config,
                    "aot_inductor.package_constants_in_so": False,
                    "aot_inductor.custom_ops_to_c_shims": operators,
                    "aot_inductor.custom_op_libs": [f":{path.name}" for path in linked],  # ":" for a file's name
                    # A lambda, since inductor copies its settings; copying a method would copy its object, too.
                    "post_grad_custom_post_pass": lambda graph: recipes.note_constants(graph),
                },
            )
            with zipfile.ZipFile(path) as made:
                for name in made.namelist():
                    if not name.endswith(".cpp"):
                        archive.writestr(f"{number}/{name.partition('/')[2]}", made.read(name))
            made_of = recipes.of(_loader(path).get_constant_fqns())
        return {"recipes": made_of, "kernels": kernels}, _limits(program)


@contextmanager
def _found_by_linkers(files: Sequence[Path]) -> Iterator[None]:
    """Add the folders of `files` to the linkers' search path inside the `with` block."""
    before = os.environ.get(_LINKED)
    folders = [*(str(path.parent) for path in files), *([before] if before else [])]
    try:
        if folders:
            os.environ[_LINKED] = os.pathsep.join(folders)
        yield
    finally:
        if before is None:
            os.environ.pop(_LINKED, None)
        else:
            os.environ[_LINKED] = before


def _inputs(program: ExportedProgram) -> list[Node]:
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return [by_name[name] for name in program.graph_signature.user_inputs]


def _limits(program: ExportedProgram) -> list[list[int]]:
    """Return (input, dimension, minimum, maximum) for each input size that the code or its kernels limit."""
    known, limits = {}, []
    for number, node in enumerate(_inputs(program)):
        for index, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                known[size.node.expr] = number, index
    for symbol, taken in program.range_constraints.items():
        least = int(taken.lower) if taken.lower > 0 else 0
        most = int(taken.upper) if taken.upper < sys.maxsize else sys.maxsize
        if least > 2 or most < sys.maxsize:
            if symbol not in known:
                raise PackagingError(f"a limit that is no input's: {symbol} in {taken}")
            limits.append([*known[symbol], least, most])
    return limits


class _Program(nn.Module):
    """Wraps a function of tensors as a module, since `torch.export` accepts only modules."""

    def __init__(self, module: nn.Module, function: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.module, self._function = module, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._function(*tensors))


class _Recipes:
    """Records how inductor makes constants from weights. A recipe is a weight's name, or an operator and arguments."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names = {_place(weight): name for name, weight in weights.items()}
        self._folded: dict[int, tuple[weakref.ref[Tensor], _Json]] = {}
        self._constants: dict[str, Tensor] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record recipes of the constants that inductor computes in advance inside the `with` block."""
        from torch._inductor.constant_folding import ConstantFolder

        stock = ConstantFolder.add_node_replacement

        def add_node_replacement(folder: ConstantFolder, node: Node, tensor: Tensor) -> None:
            stock(folder, node, tensor)
            with suppress(PackagingError):  # This constant needs no recipe if later folding removes it.
                self._folded[id(tensor)] = weakref.ref(tensor), self._of_node(node, folder.fetch_attr)

        ConstantFolder.add_node_replacement = add_node_replacement  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            ConstantFolder.add_node_replacement = stock  # type: ignore[method-assign]

    def note_constants(self, graph: Graph) -> None:
        """Record the constants that the code reads. Inductor calls this as its last pass over a graph."""
        assert graph.owning_module is not None
        interpreter = torch.fx.Interpreter(graph.owning_module)
        for node in graph.find_nodes(op="get_attr"):
            self._constants[str(node.target)] = interpreter.fetch_attr(str(node.target))

    def of(self, names: Sequence[str]) -> dict[str, _Json]:
        missing = [name for name in names if name not in self._constants]
        if missing:
            raise PackagingError(f"constants of unknown origin: {missing[:3]}")
        return {name: self._of_tensor(self._constants[name]) for name in names}

    def _of_tensor(self, tensor: Tensor) -> _Json:
        reference, recipe = self._folded.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor:
            return recipe
        name = None if tensor.is_mkldnn else self._names.get(_place(tensor))
        if name is None:
            raise PackagingError(f"a constant of {list(tensor.shape)} that is none of the weights")
        return {"weight": name}

    def _of_node(self, node: Node, fetch: Callable[[str], Tensor]) -> _Json:
        if node.op == "get_attr":
            return self._of_tensor(fetch(str(node.target)))
        if not isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            raise PackagingError(f"a constant made by {node.target}")

        def written(argument: Argument) -> _Json:
            if isinstance(argument, Node):
                return self._of_node(argument, fetch)
            if isinstance(argument, list | tuple):
                return [written(part) for part in argument]
            if isinstance(argument, torch.dtype | torch.memory_format | torch.layout):
                return {"torch": str(argument).removeprefix("torch.")}
            if isinstance(argument, torch.device):
                return {"device": str(argument)}
            if argument is None or isinstance(argument, bool | int | float | str):
                return argument
            raise PackagingError(f"a constant made of {argument!r}")

        keywords = {name: written(argument) for name, argument in node.kwargs.items()}
        return {"operator": str(node.target), "arguments": written(node.args), "keywords": keywords}


def _made(recipe: _Json, weights: Mapping[str, Tensor]) -> Any:
    """Make from `weights` the value that a recipe describes: a constant, or the argument of a recipe's operator."""
    if isinstance(recipe, list):
        return [_made(part, weights) for part in recipe]
    if not isinstance(recipe, dict):
        return recipe
    if "weight" in recipe:
        return weights[recipe["weight"]]
    if "torch" in recipe:
        return getattr(torch, recipe["torch"])
    if "device" in recipe:
        return torch.device(recipe["device"])
    operator: Any = reduce(getattr, recipe["operator"].split("."), torch.ops)
    with torch.inference_mode(False), torch.no_grad():
        keywords = {key: _made(part, weights) for key, part in recipe["keywords"].items()}
        return operator(*_made(recipe["arguments"], weights), **keywords)


def _renamed(recipes: _Json, names: Mapping[str, str]) -> _Json:
    """Return recipes with the names of weights replaced by those in `names`."""

    def renamed(part: dict[str, _Json]) -> dict[str, _Json]:
        name = part.get("weight")
        return {"weight": names[name]} if isinstance(name, str) else part

    return json.loads(json.dumps(recipes), object_hook=renamed)


class _Constant:
    """A constant of loaded code. Its deletion frees packed weights, since PyTorch never drops a code's constants."""

    def __init__(self, recipe: _Json, weights: Mapping[str, Tensor]) -> None:
        self.tensor: Tensor = _made(recipe, weights)
        if str(recipe.get("operator")).startswith("resps."):  # its result shares no memory with a weight
            weakref.finalize(self, self.tensor.untyped_storage().resize_, 0).atexit = False


class _Constants:
    """Makes the constants of one module's code. Code that is loaded at the same time shares equal constants."""

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[str, _Constant] = weakref.WeakValueDictionary()

    def made(self, recipe: _Json, weights: Mapping[str, Tensor]) -> _Constant:
        key = json.dumps(recipe, sort_keys=True)
        constant = self._made.get(key)
        if constant is None:
            constant = self._made[key] = _Constant(recipe, weights)
        return constant


def _place(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def sealed(manifest: _Manifest) -> _Manifest:
    """Return the manifest with a digest of its entries added."""
    return manifest | {"seal": _digest_of(manifest)}


def _manifest(path: Path) -> _Manifest | None:
    """Read the manifest of a package; return `None` if it is damaged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        seal = manifest.pop("seal")
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    return manifest if seal == _digest_of(manifest) else None


def _about(module: nn.Module) -> dict[str, str]:
    """Return by name all that a module's code depends on, except for the compiled function and most weight values."""
    weights = {
        name: (list(part.shape), str(part.dtype), _sampled_values(part))
        for name, part in named_weights(module).items()
    }
    count = sum(part.numel() for part in module.parameters())
    settings = torch._inductor.config.save_config_portable()
    settings.pop("aot_inductor.metadata", None)  # AOTInductor writes here while it compiles.
    return _about_here() | {
        _IN_WORDS: f"{_model_name(module)}, {count:,} parameters",
        "modules": _digest_of([str(module), _configs(module), _sources(module), weights]),
        "threads": str(torch.get_num_threads()),
        "inductor settings": _digest_of(settings),
    }


def traced_files() -> list[Path]:
    """List the files of this library whose code may be compiled into a package."""
    roots = (Path(__file__).parent.parent / name for name in _TRACED)
    files = (file for root in roots for file in (root.rglob("*") if root.is_dir() else [root]))
    return sorted(file for file in files if file.suffix in {".py", ".cpp"})


@cache
def _about_here() -> dict[str, str]:
    library = hashlib.sha256()
    for file in traced_files():
        library.update(file.read_bytes())
    return {
        "format": str(_FORMAT),
        "torch": f"{torch.__version__}, {hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16]}",
        "transformers": transformers.__version__,
        "library": library.hexdigest()[:16],
        "machine": f"{platform.machine()}, {_digest_of(_processor())}",
        "kernels": demanded_kernel() or ", ".join(our_kernels()),
    }


def _processor() -> list[str]:
    """Describe this machine's processor and its instruction sets."""
    words = [torch.backends.cpu.get_cpu_capability(), platform.processor(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    file = Path("/proc/cpuinfo")
    if file.exists():
        wanted = ("model", "flags", "cpu family", "features", "cpu part")
        words += sorted({line for line in file.read_text().splitlines() if line.lower().startswith(wanted)})
    return words


def _model_name(module: nn.Module) -> str:
    named = (str(part.name_or_path) for part in module.modules() if getattr(part, "name_or_path", None))
    return next(named, type(module).__name__)


def _configs(module: nn.Module) -> list[str]:
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return [f"{config} {getattr(config, '_attn_implementation', None)}" for config in configs.values()]


def _sources(module: nn.Module) -> list[str]:
    """Return the bytecode of all forwards and hooks, since users may patch them. Transformers' hooks are left out."""
    marks = set()
    for part in module.modules():
        own = [vars(part).get("forward"), *part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        added = [
            one for one in own if one is not None and not getattr(one, "__module__", "").startswith("transformers")
        ]
        for function in (type(part).forward, *added):
            code = getattr(function, "__code__", None)
            made_of = type(function) if code is None else (code.co_code.hex(), code.co_names)
            marks.add(f"{type(part).__module__} {type(part).__qualname__} {made_of}")
    return sorted(marks)


def _sampled_values(weight: Tensor) -> list[str]:
    """Return a weight's first values, or none if it is not in CPU memory, since copies would be slow."""
    if weight.device.type != "cpu" or not weight.numel():
        return []
    first = weight[(0,) * (weight.dim() - 1)] if weight.dim() else weight[None]
    return [repr(value) for value in first[:_SAMPLED].tolist()]


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise UnfitPackageError("it is damaged") from fault


def _digest_of(value: _Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_NAME_LENGTH]
