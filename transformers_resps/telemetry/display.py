"""How decoding is shown: the text that each token adds, steps as lines of a terminal, a bar that moves.

Only `print_steps` needs the package `rich`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character that later tokens complete


def decoder(tokenizer: Any) -> Decode:
    """Return how `tokenizer` writes tokens, special ones included and spaces untouched."""

    def decode(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


def detokenize_incrementally(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """Return what each token adds to the text.

    Decoding one token alone loses leading spaces and cuts characters apart, so each is decoded together with the piece
    before it. A token that only begins a character adds nothing; the token that completes it adds all of it.
    """
    pieces = []
    window, known = 0, 0  # tokens from `window` are decoded together; those before `known` are written already
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[window:end])
        if text.endswith(_UNFINISHED) and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[window:known])) :])
        window, known = known, end
    return pieces


def decode_after(previous: int, token_id: int, decode: Decode) -> str:
    """Return what one token would add after another."""
    return decode([previous, token_id])[len(decode([previous])) :]


ACCEPTED = "bold cyan"
# A terminal obeys control characters, and a model may write any of them: show pictures of them instead.
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421", ord("\t"): "⇥", ord("\n"): "↵"}
_PICTURES |= {code: "\ufffd" for code in range(0x80, 0xA0)}


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step as it is printed.

    Attributes:
        shape: in words.
        verified: nodes of the target forward.
        accepted: text of each drafted token that was kept.
        bonus: text of the token that the target picked itself.
        seconds: of drafting, of verifying, of the rest.
    """

    shape: str
    verified: int
    accepted: list[str]
    bonus: str
    seconds: tuple[float, float, float]


def print_steps(lines: Sequence[StepLine], headline: str, console: "Console | None" = None) -> None:
    """Print the text with accepted tokens in colour, a table of all steps, and a line about all of them.

    Raises:
        ImportError: the package `rich` is missing.
    """
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise ImportError(
            "`show` needs the package `rich`. Run `pip install 'transformers-resps[inspect]'`, or read `steps` and "
            "`answers`."
        ) from error

    console = console or Console()
    console.print(_text(lines))
    console.print(Text("\nEvery step: nodes verified, milliseconds, tokens added"), soft_wrap=True)
    console.print(_table(lines))
    console.print(Text(headline), soft_wrap=True)


def _text(lines: Sequence[StepLine]) -> "Text":
    from rich.text import Text

    text = Text()
    for line in lines:
        text.append(_shown("".join(line.accepted), keep_lines=True), ACCEPTED)
        text.append(_shown(line.bonus, keep_lines=True))
    return text


def _table(lines: Sequence[StepLine]) -> "Table":
    """Make the table; texts have columns of their own, so that nothing depends on colour."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("step", "shape", "nodes", "draft", "verify", "rest"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    table.add_column("accepted drafts", style=ACCEPTED, overflow="fold")
    table.add_column("bonus token", overflow="fold")
    for number, line in enumerate(lines):
        milliseconds = [f"{1e3 * seconds:.1f}" for seconds in line.seconds]
        accepted = Text("·").join(Text(_shown(piece)) for piece in line.accepted)
        table.add_row(str(number), line.shape, str(line.verified), *milliseconds, accepted, Text(_shown(line.bonus)))
    return table


def _shown(text: str, *, keep_lines: bool = False) -> str:
    return text.translate(_PICTURES | {ord("\n"): "\n"} if keep_lines else _PICTURES)


class Bar(Protocol):
    """What is moved: a `tqdm`, for example."""

    def update(self, n: int) -> Any: ...


@contextmanager
def moving(bar: Bar, model: nn.Module, rows: int, most_steps: int) -> Iterator[None]:
    """Inside, `bar` moves by `rows`, evenly over the forwards that a batch of so many rows takes at most.

    What is left when the batch ends early is made up at the end.
    """
    steps = shown = 0

    def move(*_: Any) -> None:
        nonlocal steps, shown
        steps += 1
        reached = rows * min(steps, most_steps) // most_steps
        bar.update(reached - shown)
        shown = reached

    handle = model.register_forward_hook(move)
    try:
        yield
        bar.update(rows - shown)
    finally:
        handle.remove()
