"""Time the steps of head training, of two source trees in turn.

Question: how many tokens a second does a head train, where does the time go, and which of two versions is faster?
Answer: SmolLM2 with 5 levels, EPYC with AVX512-BF16, two threads, steps of 1,000 tokens, ab51592 against 2fcfab3,
medians of pairs: in bfloat16 1.45x with cached features (853 tokens/s) and 1.22x with the target per step (442), in
float32 1.22x (638) and 1.20x (329). Matrix products are 70% of a step in bfloat16 and over 80% in float32; without a
cache most of them are the target's.

    python -m training.studies.head_speed --target TARGET --texts gsm8k.jsonl --against /tmp/old
    python -m training.studies.head_speed --target TARGET --texts gsm8k.jsonl --dtype bfloat16 --profile

Method: `git worktree add /tmp/old COMMIT` makes the other tree. A process for each tree runs `DraftHeadTrainer` on the
same batches of GSM8K and waits before each step until it is asked for. The trees take each step one after the
other and change places at every step, so that a busy machine slows both. A rate is the tokens of all steps, padding
included, over their seconds; a ratio is the median over the pairs. Processor seconds depend less on what else runs:
compare those, with one thread, on a busy machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from transformers_resps import DraftHead, prepack
from transformers_resps.data.batches import IGNORED, TokenBudgetBatches, collate
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig, FrozenTarget


ROOT = Path(__file__).parents[2]
WARM_UP = 2  # steps that are not counted
# An operation is of the first kind with one of these words in its name.
KINDS = {
    "matrix products": ("mm", "mkldnn", "linear", "addmv"),
    "attention": ("attention",),
    "softmax and exp": ("softmax", "exp_", "logsumexp", "cross_entropy"),
    "copies and casts": ("copy", "cat", "clone", "index", "gather", "fill", "zero", "nonzero", "isin", "sort", "triu"),
    "elementwise and sums": ("mul", "add", "sub", "div", "sum", "neg", "silu", "sqrt", "pow", "mean", "norm", "lerp"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and on what."""

    target: str
    texts: str
    dtype: str
    target_dtype: str
    cached: bool
    turns: int
    tokens: int
    levels: int
    draft_vocab_size: int
    steps: int


def batches_of(setting: Setting) -> list[dict[str, Tensor]]:
    """A batch for each step, of texts of a few questions with their answers; the answers are predicted."""
    tokenizer = AutoTokenizer.from_pretrained(setting.target)
    rows: list[dict[str, Tensor]] = []
    with Path(setting.texts).open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in islice(lines, setting.tokens * setting.steps // 100)]
    for first in range(0, len(pairs), setting.turns):
        parts = [pair[name] for pair in pairs[first : first + setting.turns] for name in ("question", "answer")]
        ids = [tokenizer(part + "\n")["input_ids"] for part in parts]
        mask = [torch.full((len(part),), index % 2 == 1) for index, part in enumerate(ids)]
        rows.append({"input_ids": torch.tensor([one for part in ids for one in part]), "loss_mask": torch.cat(mask)})
    full = TokenBudgetBatches([len(row["input_ids"]) for row in rows], setting.tokens)
    batches = [collate([rows[index] for index in batch]) for batch in islice(full, setting.steps)]
    if len(batches) < setting.steps:
        raise ValueError(
            f"{setting.texts} fills {len(batches)} batches, {setting.steps} are needed. Pass fewer steps."
        )
    return batches


class Stopwatch(TrainerCallback):
    """Runs each step of a training when a line asks for it, and answers what it took."""

    def __init__(self, answers: Any, tokens: list[int]) -> None:
        self.answers, self.tokens = answers, tokens
        self.measuring = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for a line: `time` or `profile`."""
        wants_profile = sys.stdin.readline().strip() == "profile"
        self.profile = (
            self.measuring.enter_context(profile(activities=[ProfilerActivity.CPU])) if wants_profile else None
        )
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        took = {"seconds": time.perf_counter() - self.started[0], "cpu": time.process_time() - self.started[1]}
        self.measuring.close()
        took["tokens"] = self.tokens[state.global_step - 1]
        operations = self.profile.key_averages() if self.profile else ()
        self.answers(took | {"operations": {one.key: one.self_cpu_time_total for one in operations}})


class GivenBatches(DraftHeadTrainer):
    """Trains on the batches themselves."""

    batches: list[dict[str, Tensor]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def work(setting: Setting) -> None:
    """Train, a step for each line on stdin; write a line of JSON for each, and the mean loss at the end."""
    stdout, sys.stdout = sys.stdout, sys.stderr

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=stdout, flush=True)

    batches = batches_of(setting)
    target = AutoModelForCausalLM.from_pretrained(setting.target, dtype=getattr(torch, setting.target_dtype))
    counts = torch.bincount(
        torch.cat([batch["input_ids"].flatten() for batch in batches]), minlength=target.config.vocab_size
    )
    torch.manual_seed(0)
    head = DraftHead.from_target(target, draft_token_ids=counts.topk(setting.draft_vocab_size).indices, fc_norm=True)
    if setting.cached:
        frozen = FrozenTarget(target, list(head.config.feature_layers or []))
        batches = [with_features(batch, frozen) for batch in batches]
    tokens = [batch["input_ids"].numel() for batch in batches]
    named = {field.name for field in fields(DraftHeadTrainingConfig)}
    if "ttt_steps" in named and target.dtype is torch.float32:
        prepack(target)  # as the trainer does with a target that it loads; the older tree did not
    with tempfile.TemporaryDirectory() as folder:
        args = DraftHeadTrainingConfig(
            output_dir=folder,
            logging_strategy="no",
            bf16=setting.dtype == "bfloat16",
            use_cpu=not torch.accelerator.is_available(),
            max_steps=setting.steps,
            **{"ttt_steps" if "ttt_steps" in named else "steps": setting.levels},
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GivenBatches(model=head.float(), target=target, args=args, callbacks=[Stopwatch(answer, tokens)])
        trainer.batches = batches
        answer({"loss": trainer.train().training_loss})


def with_features(batch: dict[str, Tensor], target: FrozenTarget) -> dict[str, Tensor]:
    """As read from the disk by a training with `feature_cache_dir`."""
    read = target.read(batch["input_ids"], batch["labels"] != IGNORED)
    return {**batch, "features": read.features.bfloat16(), "hidden": read.hidden.bfloat16(), "picks": read.picks.int()}


class Worker:
    """A process that trains with the sources in `tree`."""

    def __init__(self, tree: Path, setting: Setting) -> None:
        command = [
            sys.executable,
            "-P",
            __file__,
            "--target",
            "",
            "--texts",
            "",
            "--work",
            json.dumps(asdict(setting)),
        ]
        path = {**os.environ, "PYTHONPATH": str(tree)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=tree, env=path, stdin=pipe, stdout=pipe, text=True)

    def step(self, how: str = "time") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The training in {self.process.args} ended early: see its messages above.")
        told: dict[str, Any] = json.loads(line)
        return told


def shares(operations: dict[str, float]) -> str:
    """Milliseconds by kind of operation, and the operations that take most; `operations` are in microseconds."""
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in (*KINDS, "rest")}
    for name, microseconds in operations.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        kinds[kind][name] += microseconds / 1e3
    total = sum(operations.values()) / 1e3
    lines = [f"{total:.0f}"]
    for kind, spent in kinds.items():
        most = ", ".join(f"{name} {milliseconds:.0f}" for name, milliseconds in spent.most_common(6))
        lines.append(f"    {kind}: {spent.total():.0f} ({spent.total() / total:.0%}; {most})")
    return "\n".join(lines)


def measure(setting: Setting, trees: list[Path], profiled: bool) -> None:
    """Print what the trees take for the steps of one setting."""
    workers = [Worker(tree, setting) for tree in trees]
    took: list[list[dict[str, Any]]] = [[] for _ in workers]
    last = setting.steps - 1
    for step in range(setting.steps):
        for index in range(len(workers))[:: -1 if step % 2 else 1]:
            took[index].append(workers[index].step("profile" if profiled and step == last else "time"))
    losses = [worker.answer()["loss"] for worker in workers]
    timed = [steps[WARM_UP : last if profiled else None] for steps in took]
    features = "cached" if setting.cached else "live"
    for tree, steps, loss in zip(trees, timed, losses, strict=True):
        rates = [sum(one["tokens"] for one in steps) / sum(one[key] for one in steps) for key in ("seconds", "cpu")]
        cells = f"{setting.dtype} | {features} | {tree.name} | {rates[0]:.1f} | {rates[1]:.1f} | {loss:.4f}"
        print(f"| {cells} |", flush=True)
    for key in ("seconds", "cpu") if len(trees) > 1 else ():
        ratios = sorted(theirs[key] / ours[key] for ours, theirs in zip(*timed, strict=True))
        print(f"  {key}: {median(ratios):.3f} times as fast, {ratios[0]:.3f} to {ratios[-1]:.3f}")
    for tree, steps in zip(trees, took, strict=True) if profiled else ():
        print(f"  {tree.name}, ms of the last step: " + shares(steps[-1]["operations"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--against", type=Path, help="folder of the sources to compare with")
    parser.add_argument("--texts", required=True, help="JSONL with `question` and `answer`, as GSM8K")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], help="of the head's autocast, each in turn"
    )
    parser.add_argument("--target-dtype", help="of the target; as --dtype by default")
    parser.add_argument("--turns", type=int, default=1, help="questions with an answer in a text")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--features", nargs="+", choices=["live", "cached"], default=["live", "cached"])
    parser.add_argument("--profile", action="store_true", help="also show what the last step's operations took")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Setting(**json.loads(args.work)))
        return
    trees = [ROOT, *([args.against.resolve()] if args.against else [])]
    print("| dtype | features | tree | tokens/s | per processor second | mean loss |\n|---|---|---|---:|---:|---:|")
    for dtype in args.dtype:
        for features in args.features:
            setting = Setting(
                target=args.target,
                texts=str(Path(args.texts).resolve()),
                dtype=dtype,
                target_dtype=args.target_dtype or dtype,
                cached=features == "cached",
                turns=args.turns,
                tokens=args.tokens,
                levels=args.levels,
                draft_vocab_size=args.draft_vocab_size,
                steps=args.steps,
            )
            measure(setting, trees, args.profile)


if __name__ == "__main__":
    main()
