"""Runs the demo: a target answers prompts by several methods, and the findings are printed."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers.utils import logging as transformers_logging

from transformers_resps.calibration import device_name
from transformers_resps.compat import cpu_flags
from transformers_resps.data import to_tokens
from transformers_resps.generation.attach import attach
from transformers_resps.heads import DraftHead
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.telemetry.display import decoder
from transformers_resps.tools.inspect import Examination, facts_of, page, page_data
from transformers_resps.verifying.prepacking import prepack

from .answering import AUTO, LOOKUP, PLAIN, TREE, Answers, answer, drafting, examine
from .report import FASTER, NORMAL_MODE, WORDS, table, verdict
from .target import load_smollm2


PROMPTS = Path(__file__).with_name("prompts.jsonl")
METHODS = (PLAIN, LOOKUP, TREE, AUTO)
_UNITS = {"avx512_bf16", "amx_bf16"}  # of a CPU that multiplies bfloat16 itself
_WARM_UP_TOKENS = 8
_SHOWN = 150  # characters of a question or an answer


class Demo:
    """A target in one dtype, its head, and the terminal they answer in."""

    def __init__(self, console: Console, head_path: str, dtype: torch.dtype, max_new_tokens: int) -> None:
        model, self.tokenizer = load_smollm2(dtype)
        self.console, self.max_new_tokens = console, max_new_tokens
        self.model = attach(prepack(model))  # all methods decode with packed weights
        self.head = DraftHead.from_pretrained(head_path, target=model)
        self.settings = {"invariant": True} if dtype is torch.bfloat16 else {}

    def twice(self, row: dict[str, Any]) -> tuple[Answers, Examination]:
        """Answer one prompt by stock `generate` and with a tree; print both texts."""
        prompt_ids = self._ask(row)
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            answers, examination = examine(
                self.model, self.head, prompt_ids, self.max_new_tokens, lambda *told: self._show(live, *told)
            )
        for method, one in answers.by_method.items():
            self.console.print(f"{method:6} | {self.text_of(one.token_ids.tolist())}", markup=False, highlight=False)
        return answers, examination

    def by_all_methods(self, row: dict[str, Any]) -> Answers:
        """Answer one prompt by each method in turn; print the text that they share."""
        prompt_ids = self._ask(row)
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            found = {
                method: answer(
                    method,
                    self.model,
                    self.settings | drafting(method, self.head),
                    prompt_ids,
                    self.max_new_tokens,
                    lambda *told: self._show(live, *told),
                )
                for method in METHODS
            }
        answers = Answers(prompt_ids, found)
        self.console.print(_shortened(self.text_of(found[PLAIN].token_ids.tolist())), markup=False, highlight=False)
        return answers

    def warm_up(self) -> None:
        """Probe the kernels, and pack what is packed at first use."""
        prompt_ids = to_tokens([{"role": "user", "content": "Hello"}], self.tokenizer)
        for method in METHODS:
            added = self.settings | drafting(method, self.head)
            answer(method, self.model, added, prompt_ids, _WARM_UP_TOKENS, lambda *_: None)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Decode without the end token."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def write_page(self, examination: Examination, prompt: str, file: Path) -> None:
        """Write every step of an answer, to look at in a browser; nothing is decoded again."""
        facts = facts_of(self.model, self.head, FixedPolicy(self.head.default_shape), "greedy")
        data = page_data(examination, decoder(self.tokenizer), prompt, facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(data), encoding="utf-8")

    def _ask(self, row: dict[str, Any]) -> torch.Tensor:
        self.console.print(
            f"> {_shortened(row['messages'][-1]['content'])}", style="cyan", markup=False, highlight=False
        )
        return to_tokens(row["messages"], self.tokenizer)

    def _show(self, live: Live, method: str, tokens: list[int], tokens_per_second: float) -> None:
        """Nothing where no terminal draws it."""
        if self.console.is_terminal:
            told = Text(f"{method}: {len(tokens)} tokens, {tokens_per_second:.1f} tokens/s", style="dim")
            live.update(told, refresh=True)


def run(args: argparse.Namespace) -> int:
    """Answer one prompt in float32, and all in bfloat16 where the machine has units for it; print the findings."""
    console = Console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    print("demo: SmolLM2-135M-Instruct. The first time its weights are unpacked: half a minute.", file=sys.stderr)

    console.rule("[bold]1. float32: plain `generate`, and with a draft head", align="left")
    exact = Demo(console, args.head, torch.float32, args.max_new_tokens)
    pair, examination = exact.twice(rows[0])
    console.print(f"The same text: {'yes' if pair.are_same else 'NO'}.\n", highlight=False)
    exact.write_page(examination, rows[0]["messages"][-1]["content"], args.page)

    has_units = torch.cuda.is_available() or bool(_UNITS & cpu_flags())
    dtype, how = (torch.bfloat16, "bfloat16 and `invariant=True`") if has_units else (torch.float32, "float32")
    reason = "" if has_units else ", as this processor has no bfloat16 units"
    console.rule(f"[bold]2. {how}{reason}: {len(rows)} prompts, {len(METHODS)} methods", align="left")
    demo = Demo(console, args.head, dtype, args.max_new_tokens) if has_units else exact
    demo.warm_up()
    answers, started = [], time.monotonic()
    for row in rows:
        answers.append(demo.by_all_methods(row))
        if (ahead := len(rows) - len(answers)) > 0:
            left = (time.monotonic() - started) / len(answers) * ahead
            console.print(f"{ahead} more, about {max(round(left), 1)} s", style="dim", highlight=False)
    console.print(table(answers))
    for line in (
        WORDS,
        *([NORMAL_MODE] if has_units else []),
        verdict(answers, device_name(demo.model.device)),
        FASTER,
    ):
        console.print(line, markup=False, highlight=False)
    console.print(f"Every step of the first answer, to look at in a browser: {args.page}", soft_wrap=True)
    return 0 if pair.are_same and all(one.are_same for one in answers) else 1


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
