"""`report.show()`: what a person reads in a terminal or in a log."""

import builtins
import sys
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, SpeculationReport, StepRecord, TreeShape, attach
from transformers_resps.telemetry import RowCounts


PLAIN = StepRecord(TreeShape.plain(), 0, 1, RowCounts([0]), RowCounts([1]), 0.0, 1.0, 1.0)
TREE = StepRecord(TreeShape(8, 4, 2, 6), 20, 14, RowCounts([2]), RowCounts([3]), 0.25, 0.5, 1.0)


def printed(report: SpeculationReport, *arguments: Any, terminal: bool = False, **keywords: Any) -> str:
    console = Console(
        file=StringIO(), width=100, force_terminal=terminal, color_system="standard" if terminal else None
    )
    report.show(*arguments, console=console, **keywords)
    return console.file.getvalue()


def two_steps() -> SpeculationReport:
    return SpeculationReport(1, [PLAIN, TREE], [[7, 4, 11, 14]])  # h e l o


def test_every_step_is_a_line_with_its_shape_nodes_milliseconds_and_tokens() -> None:
    lines = [line.split() for line in printed(two_steps(), letter_tokenizer()).splitlines()]
    assert ["helo"] in lines
    assert ["0", "prefill", "1", "0.0", "1000.0", "0.0", "h"] in lines
    assert ["1", "8/4/2+6", "14", "250.0", "500.0", "250.0", "e·l", "o"] in lines


def test_a_row_that_the_batch_does_not_have_is_refused() -> None:
    for row in (1, -2):
        with pytest.raises(ValueError, match=f"Got row={row}, but the batch has 1 rows"):
            printed(two_steps(), row=row)


def test_tau_and_the_share_of_each_part_are_told() -> None:
    assert "4 tokens in 2 forwards of the target, 1 of them over trees: tau 2.00, 2.0 tokens/s." in printed(
        two_steps()
    )
    assert "drafting 12%, verifying 75%, the rest 12%" in printed(two_steps())


def test_accepted_tokens_are_coloured_and_the_targets_own_are_not() -> None:
    first = printed(two_steps(), letter_tokenizer(), terminal=True).splitlines()[0]
    assert first == "h\x1b[1;36mel\x1b[0mo"
    assert "\x1b" not in printed(two_steps(), letter_tokenizer())


def test_without_a_tokenizer_token_ids_are_shown() -> None:
    assert printed(two_steps()).splitlines()[0].split() == ["7", "4", "11", "14"]


def test_without_a_console_it_prints_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    two_steps().show()
    assert "tau 2.00" in capsys.readouterr().out


def test_a_row_of_a_batch_shows_its_own_tokens() -> None:
    steps = [
        StepRecord(TreeShape.plain(), 0, 1, RowCounts([0, 0]), RowCounts([1, 1]), 0.0, 1.0, 1.0),
        StepRecord(TreeShape(4, 2, 2), 4, 4, RowCounts([1, 0]), RowCounts([2, 0]), 0.0, 1.0, 1.0),
    ]
    report = SpeculationReport(2, steps, [[7, 4, 11], [8, 0, 0]])
    assert printed(report, letter_tokenizer()).splitlines()[0].strip() == "hel"
    assert printed(report, letter_tokenizer(), row=1).splitlines()[0].strip() == "i"


def test_what_a_terminal_would_obey_is_shown_as_a_picture() -> None:
    class Spiteful:
        def decode(self, token_ids: list[int], **_: Any) -> str:
            return "\x1b[2J[red]\n" * len(token_ids)

    text = printed(SpeculationReport(1, [PLAIN], [[0]]), Spiteful(), terminal=True)
    assert "\x1b[2J" not in text
    assert "␛[2J[red]↵" in text


def test_a_missing_rich_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = builtins.__import__

    def without_rich(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return stock(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "transformers_resps.telemetry.console", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    with pytest.raises(ImportError, match=r"needs the package `rich`.*transformers-resps\[inspect\].*or read `steps`"):
        two_steps().show()


def test_the_shown_answer_of_a_call_is_the_text_that_it_returns(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    keywords: dict[str, Any] = {"policy": FixedPolicy(TreeShape(6, 3, 2, 4)), "max_new_tokens": 30}
    batch = {name: torch.cat([tensor, tensor]) for name, tensor in prompt.items()}
    batch["input_ids"][1, -1] = 9
    for inputs in (prompt, batch):
        out = attach(tiny_target).generate(
            **inputs, assistant_model=tiny_head, do_sample=False, return_dict_in_generate=True, **keywords
        )
        for row, sequence in enumerate(out.sequences[:, 7:].tolist()):
            emitted = sum(step.emitted[row] for step in out.speculation.steps)
            shown = printed(out.speculation, row=row).partition("Every step")[0].split()
            assert [int(token) for token in shown] == sequence[:emitted]
            assert emitted == 30 or 2 in sequence[:emitted]
