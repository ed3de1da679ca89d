"""What a benchmark is asked to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..tree import TreeShape


PROMPT_LOOKUP, EAGLE, BEST_FIXED, CEILING = "prompt-lookup", "eagle", "best-fixed", "oracle"
CHOICES = (PROMPT_LOOKUP, EAGLE, BEST_FIXED, CEILING)  # what `--methods` takes; plain decoding is always measured


def default_device() -> str:
    """Return a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """The settings of one benchmark. `resps bench` has an option for each, with the same default.

    Attributes:
        target: folder or Hub id of the target.
        head: folder or Hub id of a draft head for it.
        datasets: files or Hub ids whose prompts are answered.
        policies: "auto", folders or Hub ids.
        methods: of `CHOICES`; `None` for all, without the best fixed tree if no prompt is left to find it on.
        shapes: more fixed trees.
        draft_model: folder or Hub id of a small model for Transformers' assisted generation.
        peers: other libraries, of `PEERS`.
        split: of datasets from the Hub.
        limit: prompts per dataset, spread evenly over it.
        search_dataset: prompts to find the best fixed tree on; `None` for those of `datasets` beyond the limit.
        temperatures: at which every prompt is answered; 0 is greedy.
        max_new_tokens: of an answer.
        repeats: of everything.
        dtype: of the target; `None` for float32 on a CPU, and elsewhere the target's own.
        device: that everything runs on.
        compile: decode with every tree and policy once more, compiled; plain decoding is compiled anyway.
        pack: prepack the target's weights, for every method.
        threads: of the CPU; `None` leaves them to torch.
        accept_noise: measure on a busy machine too; the results say so.
        output: folder for results, table, plots and the journal.
    """

    target: str
    head: str
    datasets: Sequence[str]
    policies: Sequence[str] = ("auto",)
    methods: Sequence[str] | None = None
    shapes: Sequence[TreeShape] = ()
    draft_model: str | None = None
    peers: Sequence[str] = ()
    split: str = "test"
    limit: int = 10
    search_dataset: str | None = None
    temperatures: Sequence[float] = (0.0,)
    max_new_tokens: int = 128
    repeats: int = 3
    dtype: str | None = None
    device: str = field(default_factory=default_device)
    compile: bool = False
    pack: bool = False
    threads: int | None = None
    accept_noise: bool = False
    output: Path = Path("results/bench")
