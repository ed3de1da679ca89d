"""Prints the steps of a report to a terminal with `rich`, an optional dependency."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import SpeculationReport


ACCEPTED = "bold cyan"
# Control characters in a model's output would control the terminal, so visible symbols are printed instead.
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421", ord("\t"): "⇥", ord("\n"): "↵"}
_PICTURES |= {code: "\ufffd" for code in range(0x80, 0xA0)}


def print_steps(report: SpeculationReport, texts: Sequence[Sequence[str]], console: Console | None) -> None:
    """Print text, table and summary. For each step, `texts` lists the accepted tokens, then the bonus token."""
    console = console or Console()
    console.print(_text(texts))
    console.print(Text("\nEvery step: nodes verified, milliseconds, tokens added"), soft_wrap=True)
    console.print(_table(report, texts))
    console.print(Text(str(report)), soft_wrap=True)


def _text(texts: Sequence[Sequence[str]]) -> Text:
    text = Text()
    for tokens in texts:
        text.append(_shown("".join(tokens[:-1]), keep_lines=True), ACCEPTED)
        text.append(_shown("".join(tokens[-1:]), keep_lines=True))
    return text


def _table(report: SpeculationReport, texts: Sequence[Sequence[str]]) -> Table:
    """Make a table of all steps; accepted and bonus tokens have a column each, for terminals without colour."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("step", "shape", "nodes", "draft", "verify", "rest"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    table.add_column("accepted drafts", style=ACCEPTED, overflow="fold")
    table.add_column("bonus token", overflow="fold")
    for number, (step, tokens) in enumerate(zip(report.steps, texts, strict=True)):
        shape = str(step.shape) if number else "prefill"
        seconds = (step.draft_seconds, step.verify_seconds, step.rest_seconds)
        milliseconds = [f"{1e3 * part:.1f}" for part in seconds]
        accepted = Text("·").join(Text(_shown(token)) for token in tokens[:-1])
        bonus = Text(_shown("".join(tokens[-1:])))
        table.add_row(str(number), shape, str(step.verified), *milliseconds, accepted, bonus)
    return table


def _shown(text: str, *, keep_lines: bool = False) -> str:
    return text.translate(_PICTURES | {ord("\n"): "\n"} if keep_lines else _PICTURES)
