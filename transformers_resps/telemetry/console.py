"""Prints steps as lines of a terminal, drawn by `rich`, which the base install lacks."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


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


def print_steps(lines: Sequence[StepLine], headline: str, console: Console | None = None) -> None:
    """Print the text with accepted tokens in colour, a table of all steps, and a line about all of them."""
    console = console or Console()
    console.print(_text(lines))
    console.print(Text("\nEvery step: nodes verified, milliseconds, tokens added"), soft_wrap=True)
    console.print(_table(lines))
    console.print(Text(headline), soft_wrap=True)


def _text(lines: Sequence[StepLine]) -> Text:
    text = Text()
    for line in lines:
        text.append(_shown("".join(line.accepted), keep_lines=True), ACCEPTED)
        text.append(_shown(line.bonus, keep_lines=True))
    return text


def _table(lines: Sequence[StepLine]) -> Table:
    """Make the table; texts have columns of their own, so that nothing depends on colour."""
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
