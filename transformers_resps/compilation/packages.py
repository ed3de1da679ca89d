"""Compiled code that outlives its process: packages in the user's cache folder.

A package holds no weights. It tells how each constant of its code is made of the weights of a module, and a process
that loads it makes them again: so it takes a few megabytes, however large the model is, and no time to speak of.

It is native code. It is loaded from a folder that belongs to this user and that no other user may write, where all of
its bytes are those that were written, and only for what it was compiled for: the same weights, modules, settings,
machine and versions.
"""

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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from .kernels import demanded_kernel, our_kernels
from .native import native_operators, use_native
from .pages import collapse
from .parts import Part, UncuttableError, exported_part, parts_of, weight_names


logger = logging.getLogger(f"transformers.{__name__}")

FOLDER_VARIABLE = "RESPS_COMPILED_CODE"  # another folder, or 0 for none
KEPT = 20  # packages; the one that was used least recently goes first

_FORMAT = 2
# Of this library: all that compiled functions run. Another policy or another tool compiles nothing again.
_TRACED = ("compat.py", "compilation", "drafting", "heads", "tree.py", "verifying")
_CODE, _MANIFEST = "code.pt2", "package.json"
_NAME_LENGTH = 24  # hexadecimal digits
_IN_WORDS = "model"  # what a package tells of its module: its folder may be called otherwise, or have moved
_compiling = Lock()  # inductor's settings and its folding are the process's
_SAMPLED = 4  # values of each weight in a folder's name; the manifest has the digest of all


class PackagingError(RuntimeError):
    """Code cannot outlive its process."""


class UnfitPackageError(RuntimeError):
    """A package is damaged, or was made for something else."""


def packages_folder() -> Path | None:
    """Where packages lie: `RESPS_COMPILED_CODE`, or a folder in the Hugging Face cache; `None` where it is off."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen is None:
        return Path(HF_HOME) / "transformers-resps" / "compiled"
    return None if chosen.lower() in ("", "0", "off", "no", "false") else Path(chosen).expanduser()


@dataclass(frozen=True, slots=True)
class StoredPackage:
    """One package on disk."""

    path: Path  # its folder
    model: str  # whose code it is, in words
    code: str  # which function of it
    size: int  # bytes
    used: float  # seconds since the epoch


def stored_packages(folder: Path) -> list[StoredPackage]:
    """All that lie in a folder, the one used last first. What cannot be read is listed as damaged."""
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
    """Remove packages, and the folders that they leave empty."""
    for package in packages:
        shutil.rmtree(package.path, ignore_errors=True)
        try:
            package.path.parent.rmdir()
        except OSError:  # others lie there
            continue


class ModulePackages:
    """Packages of code in which one module's weights are constants. Warnings call it `name`.

    `module` returns it, with the weights of now, while its code is compiled or loaded; it is not kept alive.
    """

    def __init__(self, module: Callable[[], nn.Module], name: str) -> None:
        self._module, self._name = module, name
        self._about = _about(module())  # now, since modules attend by other names while code runs

    @property
    def are_kept(self) -> bool:
        return packages_folder() is not None

    @property
    def _folder(self) -> Path | None:
        folder = packages_folder()
        return None if folder is None else folder / self.identity

    @property
    def identity(self) -> str:
        """Of the module: its architecture, settings, machine and versions, and of its weights the first values."""
        return _digest_of({name: value for name, value in self._about.items() if name != _IN_WORDS})

    def have(self, code: str) -> bool:
        """Whether code of this name lies ready, for some sizes."""
        paths = [] if self._folder is None else self._folder.glob("*")
        return any((_manifest(path) or {}).get("identity", {}).get("code") == code for path in paths)

    def load(self, code: str, setting: str) -> "PackagedCode | None":
        """What was compiled for these sizes and settings, or `None`; what does not fit is removed, after a warning."""
        path = self._path(code, setting)
        if path is None or not path.is_dir():
            return None
        try:
            loaded = PackagedCode(path, self._identity(code, setting), self._module())
            os.utime(path)
        except (UnfitPackageError, RuntimeError, OSError) as fault:
            self.discard(code, setting, str(fault).splitlines()[0])
            return None
        return loaded

    def discard(self, code: str, setting: str, reason: str) -> None:
        """Remove a package, and warn."""
        path = self._path(code, setting)
        assert path is not None
        logger.warning(f"Stored code of {self._name} is not used and compiled again: {reason} ({path}).")
        shutil.rmtree(path, ignore_errors=True)

    def compile(
        self,
        code: str,
        setting: str,
        function: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        dynamic: Sequence[Sequence[int]],
        config: Mapping[str, Any],
        *,
        alike: bool,
    ) -> "PackagedCode":
        """Compile the function `code`, keep the package and load it. If it cannot be kept, it serves this process.

        The `tensors` are an example, of which the `dynamic` dimensions may change; `setting` is sizes and settings of
        the caller, `config` is inductor's. With `alike` a row must get the same bits whatever others there are.

        Raises:
            PackagingError: the code asks for certain sizes, or has constants that are not made of the weights.
        """
        identity = self._identity(code, setting)
        about = f"Compiling {self._name}"
        with (
            tempfile.TemporaryDirectory(prefix="resps-") as folder,
            tqdm(total=2, desc=about, unit="part", disable=None, leave=False) as bar,
        ):
            path = Path(folder)
            made = _compile(self._module(), function, tensors, dynamic, config, path / _CODE, bar, alike=alike)
            manifest = {"identity": identity, **made, "digest": _digest_of_file(path / _CODE)}
            (path / _MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
            loaded = PackagedCode(path, identity, self._module())
            self._keep(path, code, setting)
        return loaded

    def _keep(self, made: Path, code: str, setting: str) -> None:
        """Put a package into the folder in one step: other processes see all of it or nothing."""
        path = self._path(code, setting)
        if path is None:
            return
        partial = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))  # private
            for part in made.iterdir():
                shutil.copy(part, partial)
            try:
                partial.rename(path)
            except OSError:
                if not path.is_dir():  # another process was no faster
                    raise
            remove_packages(stored_packages(path.parent.parent)[KEPT:])
        except OSError as fault:
            logger.warning(
                f"The compiled code of {self._name} cannot be kept, and the next process will compile it again: "
                f"{fault}. Set {FOLDER_VARIABLE} to another folder, or to 0 to keep none."
            )
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def _identity(self, code: str, setting: str) -> dict[str, str]:
        return self._about | {"code": code, "setting": setting, "weights": self._weights}

    def _path(self, code: str, setting: str) -> Path | None:
        return None if self._folder is None else self._folder / _digest_of({"code": code, "setting": setting})

    @cached_property
    def _weights(self) -> str:
        return _digest_of_weights(self._module())


class PackagedCode:
    """Code of a package in this process, whose constants are made of the weights of `module`.

    Raises:
        UnfitPackageError: it is damaged, belongs to another user, or was made for another `identity`.
    """

    def __init__(self, path: Path, identity: dict[str, str], module: nn.Module) -> None:
        _check_private(path)
        manifest = _manifest(path)
        if manifest is None:
            raise UnfitPackageError("it is damaged")
        given = {name: value for name, value in identity.items() if name != _IN_WORDS}
        different = [name for name, value in given.items() if manifest["identity"].get(name) != value]
        if different:
            raise UnfitPackageError(f"it was made for other {' and '.join(different)}")
        if _digest_of_file(path / _CODE) != manifest["digest"]:
            raise UnfitPackageError("it is damaged")
        weights = _named(module)
        self._calls: list[_Call] = []
        with tempfile.TemporaryDirectory(prefix="resps-") as folder:  # where code lies before this process has it
            with zipfile.ZipFile(path / _CODE) as archive:
                archive.extractall(folder)
            for call in manifest["calls"]:
                own = {name: weights[given] for name, given in call["weights"].items()}
                constants = {
                    name: _made(recipe, own) for name, recipe in manifest["codes"][call["code"]]["recipes"].items()
                }
                loader = _loader(Path(folder) / str(call["code"]))
                # active ones, all of them, as they are: the loader keeps no copy
                loader.load_constants(constants, False, True, True)
                collapse(constants.values())
                self._calls.append(_Call(loader.boxed_run, call["inputs"], constants))
        self._outputs: list[int] = manifest["outputs"]
        self._limits = [tuple(map(int, limit)) for limit in manifest["limits"]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it serves tensors of these sizes: kernels have limits."""
        return all(least <= tensors[place].shape[index] <= most for place, index, least, most in self._limits)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        values = [*tensors]
        for run, inputs, _ in self._calls:
            values += run([values[place] for place in inputs])
        return [values[place] for place in self._outputs]


class _Call(NamedTuple):
    """Of a part of the code. `inputs` are places among the inputs of all and the outputs of the calls before."""

    run: Callable[[list[Tensor]], list[Tensor]]
    inputs: list[int]
    constants: dict[str, Tensor]  # which the code reads where they lie


def _loader(path: Path) -> Any:
    """Without `aoti_load_package`, which first runs a C++ compiler for seconds to ask what the machine can do."""
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)  # one call at a time


def _compile(
    module: nn.Module,
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    dynamic: Sequence[Sequence[int]],
    config: Mapping[str, Any],
    path: Path,
    bar: Any,
    *,
    alike: bool,
) -> dict[str, Any]:
    """Write the code of a function to `path`; returns what its manifest says of the code. The `bar` moves when the
    program is traced, and with each of its parts.
    """
    sizes = tuple(
        {dimension: torch.export.Dim.DYNAMIC for dimension in changing if part.shape[dimension] > 1}
        for part, changing in zip(tensors, dynamic, strict=True)
    )
    with _compiling, torch.inference_mode(False), torch.no_grad():
        example = tuple(part.clone() for part in tensors)
        program = torch.export.export(_Program(module, function), example, dynamic_shapes=(sizes,), strict=False)
        bar.update()
        try:
            parts = parts_of(program)
            with zipfile.ZipFile(path, "w") as archive:
                return _compile_parts(program, parts, module, config, archive, bar, alike=alike)
        except UncuttableError:
            with zipfile.ZipFile(path, "w") as archive:  # without what was compiled of some parts
                code, limits = _write_code(program, _named(module), config, archive, 0, alike=alike)
    inputs, ends = len(tensors), len(tensors) + len(program.graph_signature.user_outputs)
    call = {"code": 0, "inputs": list(range(inputs)), "weights": {name: name for name in _named(module)}}
    return {"codes": [code], "calls": [call], "outputs": list(range(inputs, ends)), "limits": limits}


def _compile_parts(
    program: torch.export.ExportedProgram,
    parts: Sequence[Part],
    module: nn.Module,
    config: Mapping[str, Any],
    archive: zipfile.ZipFile,
    bar: Any,
    *,
    alike: bool,
) -> dict[str, Any]:
    """Write the code of a program's parts, once of those that are alike."""
    bar.total = 1 + len({part.likeness for part in parts})
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    places = {by_name[name]: place for place, name in enumerate(program.graph_signature.user_inputs)}
    sizes = {
        str(size): (place, at) for node, place in places.items() for at, size in enumerate(node.meta["val"].shape)
    }
    named, numbers = weight_names(program), dict[str, int]()
    codes, calls, limits = [], [], []
    for part in parts:
        weights = {f"w{number}": named[node.name].partition(".")[2] for number, node in enumerate(part.weights)}
        if part.likeness not in numbers:
            number = numbers[part.likeness] = len(numbers)
            of_part = {name: _named(module)[given] for name, given in weights.items()}
            code, limited = _write_code(exported_part(program, part), of_part, config, archive, number, alike=alike)
            codes.append(code)
            bar.update()
            for place, at, least, most in limited:
                size = str(part.inputs[place].meta["val"].shape[at])
                if size not in sizes:
                    raise UncuttableError(f"a limit that is no input's: {size}")
                limits.append([*sizes[size], least, most])
        inputs = [places[node] for node in part.inputs]
        calls.append({"code": numbers[part.likeness], "inputs": inputs, "weights": weights})
        places |= {node: len(places) + number for number, node in enumerate(part.outputs)}
    outputs = [places[node] for node in program.graph.output_node().args[0]]
    return {"codes": codes, "calls": calls, "outputs": outputs, "limits": limits}


def _write_code(
    program: torch.export.ExportedProgram,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    archive: zipfile.ZipFile,
    number: int,
    *,
    alike: bool,
) -> tuple[dict[str, Any], list[list[int]]]:
    """Compile a program into a folder `number` of an archive; returns how its constants are made of the weights and
    which kernels it calls, and its limits.
    """
    kernels = use_native(program, alike=alike)
    recipes = _Recipes(weights)
    with tempfile.TemporaryDirectory(prefix="resps-") as folder, recipes.noted():
        path = Path(folder) / _CODE
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                **config,
                "aot_inductor.package_constants_in_so": False,
                "aot_inductor.custom_ops_to_c_shims": native_operators(),
                # a function: inductor copies its settings, and a method with its object
                "post_grad_custom_post_pass": lambda graph: recipes.note_constants(graph),
            },
        )
        with zipfile.ZipFile(path) as made:
            for name in made.namelist():
                if not name.endswith(".cpp"):
                    archive.writestr(f"{number}/{name.partition('/')[2]}", made.read(name))
        made_of = recipes.of(_loader(path).get_constant_fqns())
    return {"recipes": made_of, "kernels": kernels}, _limits(program)


def _limits(program: torch.export.ExportedProgram) -> list[list[int]]:
    """Which size of which input the code limits, and the least and the most that it takes."""
    known, limits = {}, []
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for number, name in enumerate(program.graph_signature.user_inputs):
        for index, size in enumerate(by_name[name].meta["val"].shape):
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
    """A function of tensors as the module that `torch.export` takes."""

    def __init__(self, module: nn.Module, function: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.module, self._function = module, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._function(*tensors))


class _Recipes:
    """How constants of code are made of a module's weights, noted while inductor folds them.

    A recipe is the name of a weight, or an operator with its arguments, as JSON.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names = {_place(weight): name for name, weight in weights.items()}
        self._folded: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._constants: dict[str, Tensor] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, note what inductor folds."""
        from torch._inductor.constant_folding import ConstantFolder

        stock = ConstantFolder.add_node_replacement

        def add_node_replacement(folder: ConstantFolder, node: torch.fx.Node, tensor: Tensor) -> None:
            stock(folder, node, tensor)
            try:
                self._folded[id(tensor)] = weakref.ref(tensor), self._of_node(node, folder.fetch_attr)
            except PackagingError:  # only those matter that are left in the end
                return

        ConstantFolder.add_node_replacement = add_node_replacement  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            ConstantFolder.add_node_replacement = stock  # type: ignore[method-assign]

    def note_constants(self, graph: torch.fx.Graph) -> None:
        """Note the tensors that the code reads; given to inductor as its last pass over a graph."""
        module: Any = graph.owning_module
        for node in graph.find_nodes(op="get_attr"):
            target = str(node.target)
            self._constants[target] = torch.fx.Interpreter(module).fetch_attr(target)

    def of(self, names: Sequence[str]) -> dict[str, Any]:
        missing = [name for name in names if name not in self._constants]
        if missing:
            raise PackagingError(f"constants of unknown origin: {missing[:3]}")
        return {name: self._of_tensor(self._constants[name]) for name in names}

    def _of_tensor(self, tensor: Tensor) -> Any:
        reference, recipe = self._folded.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor:
            return recipe
        name = None if tensor.is_mkldnn else self._names.get(_place(tensor))
        if name is None:
            raise PackagingError(f"a constant of {list(tensor.shape)} that is none of the weights")
        return {"weight": name}

    def _of_node(self, node: torch.fx.Node, fetch: Callable[[str], Any]) -> Any:
        if node.op == "get_attr":
            return self._of_tensor(fetch(str(node.target)))
        if not isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            raise PackagingError(f"a constant made by {node.target}")

        def written(argument: Any) -> Any:
            if isinstance(argument, torch.fx.Node):
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


def _made(recipe: Any, weights: Mapping[str, Tensor]) -> Any:
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


def _named(module: nn.Module) -> dict[str, Tensor]:
    every = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: weight.detach() for name, weight in every}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *start, tensor.shape, tensor.stride(), tensor.dtype


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own digest."""
    return manifest | {"seal": _digest_of(manifest)}


def _manifest(path: Path) -> dict[str, Any] | None:
    """What a package tells of itself; `None` where it is damaged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        seal = manifest.pop("seal")
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    return manifest if seal == _digest_of(manifest) else None


def _check_private(path: Path) -> None:
    if os.name == "posix":
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise UnfitPackageError("another user may write it")


def _about(module: nn.Module) -> dict[str, str]:
    """What code of a module depends on, but for the function and all values of the weights."""
    weights = {
        name: (list(part.shape), str(part.dtype), _sampled_values(part)) for name, part in _named(module).items()
    }
    count = sum(part.numel() for part in module.parameters())
    settings = torch._inductor.config.save_config_portable()
    settings.pop("aot_inductor.metadata", None)  # which AOTInductor writes there as it compiles
    return _about_here() | {
        _IN_WORDS: f"{_model_name(module)}, {count} parameters",
        "modules": _digest_of([str(module), _configs(module), _sources(module), weights]),
        "threads": str(torch.get_num_threads()),
        "inductor settings": _digest_of(settings),
    }


def traced_files() -> list[Path]:
    """The files of this library whose code may be in a package."""
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
    """What this machine's processor is and can do."""
    told = [torch.backends.cpu.get_cpu_capability(), platform.processor(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    file = Path("/proc/cpuinfo")
    if file.exists():
        wanted = ("model", "flags", "cpu family", "features", "cpu part")
        told += sorted({line for line in file.read_text().splitlines() if line.lower().startswith(wanted)})
    return told


def _model_name(module: nn.Module) -> str:
    for part in module.modules():
        name = getattr(part, "name_or_path", None)
        if name:
            return f"{type(part).__name__} {name}"
    return type(module).__name__


def _configs(module: nn.Module) -> list[str]:
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return [f"{config} {getattr(config, '_attn_implementation', None)}" for config in configs.values()]


def _sources(module: nn.Module) -> list[str]:
    """The code of all modules as it runs here, where a class may be patched; hooks of Transformers come and go."""
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
    """The first values; a tensor that is not in the CPU's memory is not waited for."""
    if weight.device.type != "cpu" or not weight.numel():
        return []
    first = weight[(0,) * (weight.dim() - 1)] if weight.dim() else weight[None]
    return [repr(value) for value in first[:_SAMPLED].tolist()]


def _digest_of_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in _named(module).items():
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise UnfitPackageError("it is damaged") from fault


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_NAME_LENGTH]
