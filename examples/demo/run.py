"""Runs the demo: a target in one dtype answers prompts, and the findings are printed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers.utils import logging as transformers_logging

from transformers_resps.data import to_tokens
from transformers_resps.generation.attach import attach
from transformers_resps.heads import DraftHead
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.telemetry.display import decoder
from transformers_resps.tools.inspect import facts_of, page, page_data
from transformers_resps.verifying.prepacking import prepack

from .answering import Comparison, compare
from .report import divergence_line, table, verdict
from .target import load_smollm2


PROMPTS = Path(__file__).with_name("prompts.jsonl")
_MAX_SHOWN = 160  # characters of a question


class Demo:
    """A target in one dtype, its head, and the terminal they answer in."""

    def __init__(self, console: Console, head_path: str, dtype: torch.dtype, max_new_tokens: int) -> None:
        model, tokenizer = load_smollm2(dtype)
        self.console, self.max_new_tokens = console, max_new_tokens
        self.model, self.tokenizer = attach(prepack(model)), tokenizer  # both decode with packed weights
        self.head = DraftHead.from_pretrained(head_path, target=model)
        hello = to_tokens([{"role": "user", "content": "Hello"}], tokenizer)
        compare("warm-up", self.model, self.head, hello, 8, lambda *_: None)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Decode without the end token."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def run(self, row: dict[str, Any], title: str) -> Comparison:
        """Answer one prompt twice, streamed."""
        self.console.rule(f"[bold]{title}", align="left")
        self.console.print(_shortened(row["messages"][-1]["content"]), style="dim", markup=False)
        progress: dict[str, str] = {}
        with Live(console=self.console, auto_refresh=False) as live:

            def show(method: str, tokens: list[int], tokens_per_second: float) -> None:
                progress[method] = f"{method} {len(tokens)} tokens, {tokens_per_second:.1f} tokens/s"
                lines = Text("  |  ".join(progress.values()), style="cyan")
                live.update(Group(Text(self.text_of(tokens)), lines), refresh=self.console.is_terminal)

            prompt_ids = to_tokens(row["messages"], self.tokenizer)
            result = compare(row["kind"], self.model, self.head, prompt_ids, self.max_new_tokens, show)
        self.console.print()
        return result

    def write_page(self, result: Comparison, prompt: str, file: Path) -> None:
        """Write every step of an answer, to look at in a browser; nothing is decoded again."""
        assert result.examination is not None
        facts = facts_of(self.model, self.head, FixedPolicy(self.head.default_shape), "greedy")
        data = page_data(result.examination, decoder(self.tokenizer), prompt, facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(data), encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """Answer every prompt in bfloat16 and one of them again in float32, then print the findings."""
    console = Console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]

    console.print("Loading SmolLM2-135M-Instruct in bfloat16. The first time its weights are unpacked: half a minute.")
    demo = Demo(console, args.head, torch.bfloat16, args.max_new_tokens)
    results = [demo.run(row, f"{number}/{len(rows)} {row['kind']}") for number, row in enumerate(rows, start=1)]

    parted = [row for row, result in zip(rows, results, strict=True) if result.divergence]
    console.print("Loading it again, in float32.")
    exact = Demo(console, args.head, torch.float32, args.max_new_tokens)
    again = (parted or rows)[0]
    results.append(exact.run(again, f"{again['kind']} again, in float32, where the text must be equal"))
    report(console, results, demo)
    exact.write_page(results[-1], again["messages"][-1]["content"], args.page)
    console.print(f"Every step of that last answer, to look at in a browser: {args.page}", soft_wrap=True)
    return 0 if all(result.passed for result in results) else 1


def report(console: Console, results: list[Comparison], demo: Demo) -> None:
    """Print one table, a line for every pair of texts that part, and whether a tree pays here."""
    console.print(table(results))
    for result in results:
        if result.divergence is not None:
            console.print(divergence_line(result, demo.text_of), markup=False, highlight=False)
    console.print(verdict(results[:-1]), highlight=False)
    console.print(verdict(results[-1:]), highlight=False)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
