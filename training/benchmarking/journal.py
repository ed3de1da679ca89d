"""Keeps everything measured so far in a file, from which the same command continues after an interruption."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from transformers_resps import StepRecord, TreeShape
from transformers_resps.telemetry import RowCounts
from transformers_resps.tools.methods import Bench, Method, Prompt
from transformers_resps.tools.results import AnswerTiming, Cell, Run


JOURNAL = "journal.jsonl"


class Journal:
    """Keeps the runs and notes of one output folder; it is begun if there is none.

    Args:
        folder: holds the file.
        settings: JSON values, the first line of the file.

    Attributes:
        notes: findings in JSON values, by name.

    Raises:
        ValueError: the file was written with other settings; names each that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file = file = folder / JOURNAL
        self.notes: dict[str, Any] = {}
        self._runs: dict[tuple[Cell, str], Run] = {}
        lines = self._whole_lines()
        if lines:
            _check_settings(file, lines[0]["settings"], json.loads(json.dumps(settings)))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        for line in lines[1:]:
            if "note" in line:
                self.notes[line["note"]] = line["value"]
            else:
                self._remember(_run_of(line))

    @property
    def runs(self) -> list[Run]:
        """All runs, in the order in which they were made."""
        return list(self._runs.values())

    def find(self, cell: Cell, method: str) -> Run | None:
        """Return the run of `method` in `cell`, if it was made."""
        return self._runs.get((cell, method))

    def keep(self, run: Run) -> None:
        """Write a run down."""
        self._append(
            {**asdict(run.timing), "token_ids": run.token_ids.tolist(), "steps": list(map(_written, run.steps))}
        )
        self._remember(run)

    def note(self, name: str, value: Any) -> None:
        """Write down a finding in JSON values."""
        self._append({"note": name, "value": value})
        self.notes[name] = value

    def _remember(self, run: Run) -> None:
        self._runs[run.timing.cell, run.timing.method] = run

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Read all lines, and remove an incomplete last line, which a kill leaves.

        Raises:
            ValueError: another line is damaged.
        """
        if not self.file.is_file():
            return []
        text = self.file.read_text(encoding="utf-8")
        whole, newline, rest = text.rpartition("\n")
        if rest:
            self.file.write_text(whole + newline, encoding="utf-8")
        try:
            return [json.loads(line) for line in whole.split("\n") if line]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.file} is damaged ({error}). Delete it to measure again, or pass another --output."
            ) from error


class JournaledBench(Bench):
    """Answers what the journal lacks, and writes it down."""

    def __init__(self, target: Any, max_new_tokens: int, journal: Journal) -> None:
        super().__init__(target, max_new_tokens)
        self._journal = journal

    def decode(
        self,
        prompt: Prompt,
        method: Method,
        repeat: int = 0,
        temperature: float = 0.0,
        *,
        max_new_tokens: int | None = None,
    ) -> Run:
        if max_new_tokens is not None:  # a warm-up
            return super().decode(prompt, method, repeat, temperature, max_new_tokens=max_new_tokens)
        run = self._journal.find(Cell(prompt.name, prompt.turn, temperature, repeat), method.name)
        if run is None:
            run = super().decode(prompt, method, repeat, temperature)
            self._journal.keep(run)
        return run


def _written(step: StepRecord) -> list[Any]:
    """Return a step of one row as JSON values."""
    shape = step.shape
    counts = [step.drafted, step.verified, int(step.accepted), int(step.emitted)]
    seconds = [step.draft_seconds, step.verify_seconds, step.step_seconds]
    return [[shape.total_tokens, shape.depth, shape.top_k, shape.lookup], *counts, *seconds]


def _run_of(line: dict[str, Any]) -> Run:
    measured = {name: value for name, value in line.items() if name not in ("token_ids", "steps")}
    steps = [
        StepRecord(TreeShape(*shape), drafted, verified, RowCounts([accepted]), RowCounts([emitted]), *seconds)
        for shape, drafted, verified, accepted, emitted, *seconds in line["steps"]
    ]
    return Run(AnswerTiming(**measured), torch.tensor(line["token_ids"], dtype=torch.long), steps)


def _check_settings(file: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    odd = [
        f"{name} {there.get(name)!r} (now {here.get(name)!r})"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if odd:
        raise ValueError(
            f"{file} was begun with other settings: {'; '.join(odd)}. Repeat the command as it was, pass another "
            "--output, or delete that file."
        )
