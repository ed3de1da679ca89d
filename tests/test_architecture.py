"""The house rules that a machine can hold: who may import whom, no prints, no blanket excepts."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


PACKAGE = Path(__file__).parent.parent / "transformers_resps"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> the rooms that it may import. Anything else fails: move what is needed further up.
ROOMS = {
    "compat": "",
    "hub": "compat",
    "tree": "",
    "compilation": "compat",
    "verifying": "compat tree compilation",
    "drafting": "compat tree compilation verifying",
    "heads": "compat hub tree verifying drafting",
    "assistants": "compat hub tree compilation verifying drafting heads",
    "telemetry": "tree",
    "policies": "hub tree telemetry",
    "decoding": "compat tree verifying telemetry policies drafting",
    "generation": "compat tree compilation assistants verifying heads telemetry policies drafting decoding",
    "calibration": "compat tree verifying heads policies drafting generation",
    "testing": "compat tree verifying heads telemetry policies drafting generation calibration",
    "__init__": "tree drafting assistants verifying heads telemetry policies generation calibration testing",
    "data": "hub drafting heads",
    "replay": "compat tree verifying heads telemetry policies drafting decoding",
    "trainers": "compat hub tree verifying heads assistants telemetry policies drafting generation calibration data "
    "replay",
    "tools": "compat hub tree compilation verifying drafting heads assistants telemetry policies generation "
    "calibration testing data trainers",
}
MAY_IMPORT = {room: set(rooms.split()) for room, rooms in ROOMS.items()}


def module_of(file: Path) -> str:
    """`heads/model.py` -> `heads`, `compat.py` -> `compat`."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imported_modules(file: Path) -> Iterator[str]:
    """The top-level modules of the package that `file` imports, at any depth of nesting."""
    parents = ["transformers_resps", *file.relative_to(PACKAGE).parts[:-1]]
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            names = [".".join([*filter(None, module), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "transformers_resps":
                yield parts[1] if len(parts) > 1 and parts[1] in known_modules() else "__init__"


@cache
def known_modules() -> set[str]:
    return {module_of(file) for file in FILES} - {"__init__"}


def named(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_imports_follow_the_map() -> None:
    for file in FILES:
        module = module_of(file)
        assert module in MAY_IMPORT, f"{module} is new: give it a place in MAY_IMPORT and in CONTRIBUTING.md"
        wrong = set(imported_modules(file)) - MAY_IMPORT[module] - {module}
        assert not wrong, f"{named(file)} imports {sorted(wrong)}; {module} may import {sorted(MAY_IMPORT[module])}"


def test_the_map_has_no_cycle_and_heads_and_policies_are_strangers() -> None:
    def reach(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
        assert module not in seen, f"{module} reaches itself"
        return MAY_IMPORT[module].union(*(reach(other, seen | {module}) for other in MAY_IMPORT[module]))

    assert "policies" not in reach("heads")
    assert "heads" not in reach("policies")


def test_only_what_faces_a_terminal_prints() -> None:
    for file in FILES:
        if module_of(file) == "tools":
            continue
        for node in nodes_of(file):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not is_print, f"{named(file)}, line {node.lineno}: log instead"


def test_no_message_names_a_script_that_the_wheel_lacks() -> None:
    """The docstring of a config may cite a recipe, which is a source and no way out."""
    for file in FILES:
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in nodes_of(file)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        for node in nodes_of(file):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
                assert "training/" not in node.value, f"{named(file)}, line {node.lineno}: {node.value}"


def test_no_except_swallows_everything() -> None:
    for file in FILES:
        for node in nodes_of(file):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.walk(node.type) if node.type else iter(())
                names = {part.id for part in caught if isinstance(part, ast.Name)}
                blanket = node.type is None or names & {"Exception", "BaseException"}
                ends = node.body[-1]
                cleans_up = isinstance(ends, ast.Raise) and ends.exc is None
                assert cleans_up or not blanket, f"{named(file)}, line {node.lineno}: name the exception"


def test_no_module_is_called_utils() -> None:
    banned = {"utils", "helpers", "helper", "common", "misc", "manager"}
    assert not banned & {part for file in FILES for part in file.with_suffix("").parts[-2:]}
