r"""Compare a small block head with an EAGLE-3 head that was trained for as long, on the same texts.

Question: which head should a small budget train, one that fills a block at once or one that drafts level by level?
Answer: either. After 16 processor minutes each on 336 answers of SmolLM2 the EAGLE-3 head agrees more with its target,
the block head drafts in less time, and they are about as fast. Tokens per processor second and tau in bfloat16, of 400
tokens to five prompts each; plain decoding has 17.9 and 18.0, and "auto" drafts by lookup, too:

| tree | GSM8K, EAGLE-3 | GSM8K, block | MT-Bench, EAGLE-3 | MT-Bench, block |
|---|---|---|---|---|
| 5/4/1, a chain | 30.2, 1.98 | 30.7, 1.87 | 18.3, 1.24 | 19.0, 1.16 |
| 8/4/4 | 30.3, 2.35 | 31.0, 2.16 | 17.3, 1.38 | 20.0, 1.26 |
| 16/4/4 | 27.5, 2.55 | 27.2, 2.40 | 15.9, 1.41 | 16.8, 1.29 |
| auto | 35.8, 2.67 | 37.2, 2.34 | 26.0, 1.70 | 28.3, 1.37 |

Agreement with the target's pick on held-out answers, by level: EAGLE-3 0.600 0.564 0.544 0.522 after 9.8 epochs, block
0.526 0.461 0.444 0.411 after 7.9. Both learned GSM8K alone, by heart: on what they learned from it is 0.92 and 0.84 at
the first level. So few prompts on a busy machine do not tell differences below a twentieth.

    python -m training.studies.block_heads train block work/smollm2 --dataset work/answers.jsonl \
        --minutes 16 --output work/block
    python -m training.studies.block_heads train eagle3 work/smollm2 --dataset work/answers.jsonl \
        --minutes 16 --output work/eagle3
    python -m training.studies.block_heads compare work/smollm2 work/eagle3/head work/block/head \
        --dataset eval/gsm8k.jsonl eval/mt_bench.jsonl --limit 5 --max-new-tokens 80 --output smollm2-blocks.json

The texts are greedy answers to training questions of GSM8K, 360 when the command was stopped:

    python training/generate_dataset.py --target work/smollm2 --prompts train/gsm8k.jsonl --output work/answers.jsonl \
        --limit 900 --temperatures 0 --max-new-tokens 160 --max-prompt-tokens 192 --dtype bfloat16 --seed 5

Method: equal compute is equal processor seconds of one process with one thread (`OMP_NUM_THREADS=1`), after the target
has read each text once; the rate falls over the last third of them. Both heads start from the target's rows, draft the
same vocabulary, learn 4 levels, and see the same texts as often as their seconds allow. Then the target answers
held-out prompts greedily, plainly and with each head and fixed tree in turn; a speed is tokens per processor second.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from training.benchmarking.provenance import code
from transformers_resps import AutoDraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.data import load_conversations
from transformers_resps.generation.output import sampling
from transformers_resps.tools.cli import positive, shape
from transformers_resps.tools.loading import load_target
from transformers_resps.tools.results import machine
from transformers_resps.tools.session import read_dialogues, spread


LEVELS, HELD_OUT = 4, 24
TREES = [TreeShape(LEVELS + 1, LEVELS, 1), TreeShape(8, LEVELS, 4), TreeShape(16, LEVELS, 4)]


class Budget(TrainerCallback):
    """Ends a training after so many processor seconds, and sets the rate by what is left of them."""

    def __init__(self, seconds: float, folder: Path) -> None:
        self._seconds, self._file = seconds, folder / "seconds.json"
        self._start = time.process_time()

    @property
    def spent(self) -> float:
        return time.process_time() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = json.loads(self._file.read_text(encoding="utf-8")) if state.global_step else 0.0
        self._start = time.process_time() - before

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = self.spent / self._seconds
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = args.learning_rate * max(min(share / 0.02, 3 * (1 - share), 1.0), 0.02)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.spent > self._seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._file.write_text(json.dumps(self.spent), encoding="utf-8")


def train(args: argparse.Namespace) -> None:
    """Train a new head of a kind, or go on with one."""
    from datasets import Dataset

    from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig
    from transformers_resps.trainers.base import newest_checkpoint

    args.output.mkdir(parents=True, exist_ok=True)
    budget = Budget(60 * args.minutes, args.output)
    rows = [{"messages": one} for file in args.dataset for one in load_conversations(file)]
    config = DraftHeadTrainingConfig(
        str(args.output),
        new_head=args.kind,
        ttt_steps=LEVELS,
        draft_vocab_size=args.draft_vocab_size,
        tokens_per_batch=1024,
        max_length=512,
        num_train_epochs=1000,
        lr_scheduler_type="constant",
        feature_cache_dir=str(args.output / "features"),
        save_steps=40,
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        target_init_kwargs={"dtype": "bfloat16"},
    )
    texts, held_out = Dataset.from_list(rows[HELD_OUT:]), Dataset.from_list(rows[:HELD_OUT])
    trainer = DraftHeadTrainer(None, config, texts, held_out, callbacks=[budget], target=args.target)
    trainer.train(resume_from_checkpoint=newest_checkpoint(args.output))
    trainer.write_artefact(args.output / "head")
    print(budget.spent, trainer.evaluate(), flush=True)


def speed_and_tau(
    target: Any, head: Any, policy: Policy | str | None, prompts: list[Tensor], most: int
) -> list[float]:
    """Tokens per processor second, and tokens per forward of the target."""
    how: dict[str, Any] = {} if head is None else {"assistant_model": head, "policy": policy}
    emitted, forwards, start = 0, 0, time.process_time()
    for prompt in prompts:
        asked = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
        out = target.generate(**asked, max_new_tokens=most, return_dict_in_generate=True, **how, **sampling(0.0))
        count = out.sequences.shape[1] - len(prompt)
        emitted, forwards = emitted + count, forwards + (count if head is None else out.speculation.target_forwards)
    return [round(emitted / (time.process_time() - start), 2), round(emitted / forwards, 3)]


def compare(args: argparse.Namespace) -> None:
    """Decode held-out prompts in every way."""
    target = attach(load_target(args.target, args.dtype, packed=True))
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    ways: list[tuple[str, Any, Policy | str | None]] = [("plain", None, None)]
    for folder in args.heads:
        head = AutoDraftHead.from_pretrained(folder, target)
        ways += [(f"{folder} {tree}", head, FixedPolicy(tree)) for tree in args.shapes]
        ways.append((f"{folder} auto", head, "auto"))
    rows: list[dict[str, Any]] = [{"way": name} for name, _, _ in ways]
    for file in args.dataset:
        prompts = [one.prompt(tokenizer).input_ids for one in spread(read_dialogues(file), args.limit)]
        for (name, head, policy), row in zip(ways, rows, strict=True):
            row[Path(file).stem] = speed_and_tau(target, head, policy, prompts, args.max_new_tokens)
            print(file, name, row[Path(file).stem], flush=True)
    facts = {**machine(target), **code(), "arguments": vars(args), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="a new head")
    one.add_argument("kind", choices=["eagle3", "block"])
    one.add_argument("target", help="folder or Hub id")
    one.add_argument("--minutes", type=positive, default=16, help="of a processor")
    one.add_argument("--draft-vocab-size", type=positive, default=4096)
    one.set_defaults(run=train)
    two = commands.add_parser("compare", help="trained heads")
    two.add_argument("target", help="folder or Hub id")
    two.add_argument("heads", nargs="+", help="folders or Hub ids of draft heads for the target")
    two.add_argument("--limit", type=positive, default=5, help="prompts of each file, spread evenly")
    two.add_argument("--shapes", nargs="+", type=shape, default=TREES, help="as 16,4,4")
    two.add_argument("--max-new-tokens", type=positive, default=80)
    two.add_argument("--dtype", default="bfloat16")
    two.set_defaults(run=compare)
    for command in (one, two):
        command.add_argument("--dataset", nargs="+", required=True, help=".jsonl or .json")
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
