"""Replace a function of the package, named by its symbol, by a wrong one: in this process, and nowhere else."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


Function = Callable[..., Any]
SetAttr = Callable[[Any, str, Any], None]
_KINDS = (staticmethod, classmethod, property)


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        bug: what is wrong, in words.
        symbol: the function that has it: `module:function` or `module:Class.method`, the module below the package.
        wrong: takes the right function, then its arguments.
        tests: the ones to notice, as pytest takes them.
    """

    bug: str
    symbol: str
    wrong: Function
    tests: str

    def instead_of(self, right: Function) -> Function:
        """The function with the bug, of the same arguments as the right one."""

        def replacement(*arguments: Any, **options: Any) -> Any:
            return self.wrong(right, *arguments, **options)

        _, *parameters = inspect.signature(self.wrong).parameters.values()
        replacement.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return replacement

    def plant(self, set_attr: SetAttr = setattr) -> None:
        """Put the wrong function in the place of the right one.

        Raises:
            LookupError: the package has no such symbol.
            TypeError: the function takes other arguments now.
        """
        try:
            plant(self.symbol, self.instead_of, set_attr)
        except (LookupError, TypeError) as problem:
            raise type(problem)(f"{problem}. The bug '{self.bug}' needs it: adapt tests/mutations/bugs.") from None


def bug(words: str, symbol: str, tests: str) -> Callable[[Function], Mutation]:
    """Make a function the `wrong` one of a bug."""
    return lambda wrong: Mutation(words, symbol, wrong, tests)


def plant(symbol: str, wrong: Callable[[Function], Function], set_attr: SetAttr = setattr) -> None:
    """Replace a function or method, also in modules that have imported it by name.

    Args:
        symbol: as in `Mutation`.
        wrong: makes the replacement from the original.
        set_attr: sets the attributes; `monkeypatch.setattr` to have the replacement undone.

    Raises:
        LookupError: the package has no such symbol.
        TypeError: the replacement names a parameter that the original does not have.
    """
    owner, name, stored = resolve(symbol)
    kind = next((kind for kind in _KINDS if isinstance(stored, kind)), None)
    right: Function = stored.fget if kind is property else stored.__func__ if kind else stored
    replacement = wrong(right)
    surplus = _parameters(replacement) - _parameters(right)
    if surplus:
        raise TypeError(f"`{symbol}` has no parameter {', '.join(map(repr, sorted(surplus)))}")
    set_attr(owner, name, kind(replacement) if kind else replacement)
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers_resps")]:
        for imported in [own for own, value in vars(module).items() if value is stored]:
            set_attr(module, imported, replacement)


def resolve(symbol: str) -> tuple[Any, str, Any]:
    """Whose attribute a symbol is, under which name, and what is stored there.

    Raises:
        LookupError: the package has no such symbol.
    """
    module, _, path = symbol.partition(":")
    *classes, name = path.split(".")
    try:
        owner: Any = importlib.import_module(f"transformers_resps.{module}")
        for one in classes:
            owner = getattr(owner, one)
        return owner, name, inspect.getattr_static(owner, name)
    except (ImportError, AttributeError):
        raise LookupError(f"The package has no `{symbol}`") from None


def _parameters(function: Function) -> set[str]:
    """The named ones; `*args` and `**options` may stand for any."""
    named = inspect.signature(function).parameters.values()
    return {one.name for one in named if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
