"""Part of the studies `batches`, `engine_speed`, `vllm_exports`: their models, options, table and `results.json`."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.benchmarking.provenance import code
from transformers_resps.compat import check_extra
from transformers_resps.heads import DraftHead
from transformers_resps.hub.upload import RESULTS
from transformers_resps.tools.bench import BenchConfig, BenchModels
from transformers_resps.tools.cli import DTYPES, device, model, positive, shape
from transformers_resps.tools.loading import default_device
from transformers_resps.tools.results import machine
from transformers_resps.tools.session import read_dialogues, spread


@dataclass(frozen=True, slots=True)
class Experiment:
    """The models and prompts of a study.

    Attributes:
        target: attached.
        head: drafts.
        prompts: `[s]` each, the first user turn of rows spread evenly over the file.
    """

    target: Any
    head: DraftHead
    prompts: list[Tensor]

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Experiment":
        """Load what the options of `add_options` name.

        Raises:
            ValueError: something is missing, or the head does not fit the target.
        """
        dataset = str(args.dataset)
        models = BenchModels.load(
            BenchConfig(
                args.target,
                args.head,
                [dataset],
                policies=(),
                dtype=args.dtype,
                device=args.device or default_device(),
                pack=args.pack,
            )
        )
        dialogues = spread(read_dialogues(dataset), args.limit)
        return cls(models.target, models.head, [one.prompt(models.tokenizer).input_ids for one in dialogues])

    def report(self, args: argparse.Namespace, rows: list[dict[str, Any]], runs: Sequence[Any], **more: Any) -> None:
        """Print the rows, and write `results.json`: machine, code, options, the rows, `more` and every run."""
        print_table(rows)
        facts = {**machine(self.target), **code(), "arguments": vars(args), **more, "rows": rows}
        args.output.mkdir(parents=True, exist_ok=True)
        file: Path = args.output / RESULTS
        file.write_text(json.dumps(facts | {"runs": [asdict(run) for run in runs]}, indent=1, default=str), "utf-8")
        print(f"\nWritten to {file}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as Markdown, a column for each of their keys."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = ["" if (cell := row.get(name)) is None else cell for name in columns]
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


def execute(
    parser: argparse.ArgumentParser, arguments: list[str] | None, run: Callable[[argparse.Namespace], int]
) -> int:
    """Run a command with the extra `bench`; what stops it is one line and the exit status 2."""
    args = parser.parse_args(arguments)
    try:
        check_extra("bench")
        return run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of every experiment; `output` is the default folder of its results."""
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("head", type=model, help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    parser.add_argument("--limit", type=positive, default=8, help="prompts, spread evenly over the file")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--shape", type=shape, help="total_tokens,depth,top_k[,lookup] of every tree")
    parser.add_argument("--dtype", choices=DTYPES, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    parser.add_argument("--device", type=device, help="default: cuda if available, otherwise cpu")
    parser.add_argument("--pack", action="store_true", help="prepack the target's weights, for every way")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for results.json")
