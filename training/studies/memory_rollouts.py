r"""Train with GRPO, and write every group of rollouts by several ways in turn.

Question: what does a memory of earlier rollouts save of their time, as the weights change?
Answer, of 25 groups on a busy machine: nothing. In lockstep all ways write the plain group at every step, with 1.007
tokens per forward by the memory and 1.000 by lookup where a question comes again; rows apart get 1.19 and 1.08, and no
way is measurably faster (SmolLM2 at temperature 1, 48 tokens: its answers to one question hardly repeat each other).

    python -m training.studies.memory_rollouts work/smollm2 --dataset gsm8k_train.jsonl --steps 50

Method: SmolLM2 in float32 on some questions of GSM8K, each of them once in an epoch. At every step all ways write the
same group from the same random state, through the defaults of `attach`, and the trainer gets the plain one. So a way
that writes the plain group at every step gives the plain rewards, losses and weights. Rows apart draw other groups of
the same law: compare tokens per second. A stopped command goes on from its last checkpoint, with its memories.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from transformers_resps import SuffixMemory, attach
from transformers_resps.data import load_conversations
from transformers_resps.generation.output import end_ids, up_to_end
from transformers_resps.tools.cli import model, positive
from transformers_resps.tools.loading import load_target

from .experiment import execute, print_table
from .memory_speed import KeptAuto


GROUP, PLAIN = 4, "plain"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass
class Way:
    """Defaults of `attach`, and what they learn in."""

    name: str
    defaults: dict[str, Any] = field(default_factory=dict)
    memory: SuffixMemory | None = None


def ways_of(folder: Path, tokenizer: Any, max_tokens: int) -> list[Way]:
    """All ways; their memories as the last checkpoint has left them."""
    found = [Way(PLAIN)]
    for apart in (False, True):
        rows = {"lockstep": False} if apart else {}
        for name in ("lookup", "memory"):
            way = Way(f"{name}, rows apart" if apart else name, {"policy": KeptAuto(), **rows})
            if name == "memory":
                file = memory_file(folder, way)
                way.memory = SuffixMemory.load(file, tokenizer) if file.is_file() else SuffixMemory(max_tokens)
                way.defaults["assistant_model"] = way.memory
            found.append(way)
    return found


def memory_file(folder: Path, way: Way) -> Path:
    return folder / f"{way.name.replace(', ', '-').replace(' ', '-')}.safetensors"


@dataclass
class Rollouts:
    """Stands for `generate` of an attached model.

    Args:
        target: attached.
        ways: the plain one first.
        clock: in seconds.

    Attributes:
        steps: for each call and way, what it took.
    """

    target: Any
    ways: list[Way]
    clock: Callable[[], float] = time.perf_counter
    steps: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """The plain group. All ways write it, in an order that changes, from one random state."""
        ids = inputs if inputs is not None else kwargs["input_ids"]
        started_from, ends = torch.get_rng_state(), end_ids(self.target)
        found, taken, left_at = {}, {}, {}
        for way in random.Random(len(self.steps)).sample(self.ways, len(self.ways)):
            attach(self.target, **way.defaults)
            how = {"policy": "plain"} if way.name == PLAIN else {}
            torch.set_rng_state(started_from)
            started = self.clock()
            out = type(self.target).generate(self.target, inputs, **kwargs, **how, return_dict_in_generate=True)
            seconds = self.clock() - started
            found[way.name], left_at[way.name] = out.sequences, torch.get_rng_state()
            lengths = [len(up_to_end(row, ends)) for row in out.sequences[:, ids.shape[1] :].tolist()]
            report = getattr(out, "speculation", None)
            forwards = max(lengths) if report is None else report.target_forwards
            taken[way.name] = {"seconds": seconds, "tokens": sum(lengths), "forwards": forwards}
            taken[way.name]["tau"] = 1.0 if report is None else report.tau
        for name, sequences in found.items():
            taken[name]["same"] = float(sequences.tolist() == found[PLAIN].tolist())
        self.steps.append(taken)
        torch.set_rng_state(left_at[PLAIN])
        return found[PLAIN]


class Keeper(TrainerCallback):
    """Writes what was measured and remembered beside each checkpoint."""

    def __init__(self, folder: Path, rollouts: Rollouts, tokenizer: Any) -> None:
        self._folder, self._rollouts, self._tokenizer = folder, rollouts, tokenizer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for way in self._rollouts.ways:
            if way.memory is not None:
                way.memory.save(memory_file(self._folder, way), self._tokenizer)
        (self._folder / "rollouts.json").write_text(json.dumps(self._rollouts.steps), "utf-8")
        (self._folder / "log.json").write_text(json.dumps(state.log_history), "utf-8")


def reward(completions: list[Any], gold: list[str], numbers: list[list[str]], **_: Any) -> list[float]:
    """1 where the last number is the right one, and the share of the question's numbers that an answer uses."""
    found = []
    for completion, right, asked in zip(completions, gold, numbers, strict=True):
        used = _NUMBER.findall(completion[0]["content"])
        share = sum(number in used for number in asked) / max(len(asked), 1)
        found.append(float(bool(used) and used[-1] == right) + share)
    return found


def read_questions(source: Path, count: int) -> Dataset:
    """Questions with their numbers and right answers, which end with `#### N`."""
    rows = []
    for asked, answered in load_conversations(source):
        gold = answered["content"].rpartition("####")[2].strip().replace(",", "")
        rows.append({"prompt": [asked], "gold": gold, "numbers": _NUMBER.findall(asked["content"])})
        if len(rows) == count:
            break
    return Dataset.from_list(rows)


def table(steps: list[dict[str, dict[str, float]]], epoch: int) -> list[dict[str, Any]]:
    """Of the first epoch, when every question is new, and of the later ones."""
    rows = []
    for when, part in {"questions seen first": steps[:epoch], "seen again": steps[epoch:]}.items():
        totals = {
            name: {key: sum(step[name][key] for step in part) for key in ("seconds", "tokens", "forwards", "same")}
            for name in (part[0] if part else {})
        }
        rate = {name: total["tokens"] / total["seconds"] for name, total in totals.items()}
        rows += [
            {
                "when": when,
                "way": name,
                "groups": len(part),
                "rollout seconds": total["seconds"],
                "tokens/s": rate[name],
                "to plain": rate[name] / rate[PLAIN],
                "forwards": total["forwards"],
                "tokens per forward and row": sum(step[name]["tau"] for step in part) / len(part),
                "same group": total["same"] / len(part),
            }
            for name, total in totals.items()
        ]
    return rows


def run(args: argparse.Namespace) -> int:
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target: Any = attach(load_target(args.target, "float32", "cpu"))
    last, kept = get_last_checkpoint(str(args.output)), args.output / "rollouts.json"
    rollouts = Rollouts(target, ways_of(args.output, tokenizer, args.max_tokens))
    if last is not None:
        rollouts.steps = json.loads(kept.read_text("utf-8"))
    target.generate = rollouts.generate
    config = GRPOConfig(
        str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=args.max_new_tokens,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_steps=5,
        save_total_limit=1,
        seed=0,
    )
    questions = read_questions(args.dataset, args.questions)
    keeper = Keeper(args.output, rollouts, tokenizer)
    trainer = GRPOTrainer(
        target, reward, config, train_dataset=questions, processing_class=tokenizer, callbacks=[keeper]
    )
    trainer.train(resume_from_checkpoint=last)
    keeper.on_save(config, trainer.state, None)
    print_table(table(rollouts.steps, args.questions))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with question and answer, as GSM8K")
    parser.add_argument("--questions", type=positive, default=10)
    parser.add_argument("--steps", type=positive, default=50, help="of the optimiser, each with one group of four")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=20_000, help="that a memory holds: the newest rollouts")
    parser.add_argument("--output", type=Path, default=Path("work/rollouts"), help="folder of checkpoints and results")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
