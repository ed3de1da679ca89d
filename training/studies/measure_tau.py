"""Measure the mean acceptance length (tau) of one fixed tree, whatever the machine.

Question: how good is a head, whatever the machine?
Answer: without prompt lookup, SmolLM2's head reaches a mean acceptance length (tau) of 2.47 with the tree 16/5/4, and
Qwen's 2.09 with 16/6/6 (docs/benchmarks.md).

    python -m training.studies.measure_tau work/smollm2 model_cards/smollm2-135m-instruct-head --shapes 16,5,4 \
        --dataset eval/mt_bench.jsonl eval/gsm8k.jsonl --limit 20 --output work/tau.json

Method: one fixed tree, greedy, on the first prompts of each file; of a conversation the first turn is answered.
Nothing is timed, so other work may run at the same time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.benchmarking.command import identity_of
from transformers_resps import FixedPolicy, TreeShape
from transformers_resps.generation.output import sampling
from transformers_resps.tools.bench import BenchConfig, BenchModels
from transformers_resps.tools.cli import positive, shape
from transformers_resps.tools.session import read_dialogues


def tokens_and_forwards(models: BenchModels, prompts: list[Tensor], tree: TreeShape, most: int) -> tuple[int, int]:
    """Count the tokens of all answers and the target's forwards, prefill included."""
    emitted = forwards = 0
    for prompt in prompts:
        out: Any = models.target.generate(
            prompt[None].to(models.target.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=models.target.device),
            assistant_model=models.head,
            policy=FixedPolicy(tree),
            max_new_tokens=most,
            return_dict_in_generate=True,
            **sampling(0.0),
        )
        emitted += out.speculation.emitted_total
        forwards += out.speculation.target_forwards
    return emitted, forwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("head", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", nargs="+", required=True, help=".jsonl or .json with turns, messages or prompt")
    parser.add_argument("--limit", type=positive, default=20, help="the first prompts of each file")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[TreeShape(16, 5, 4)], help="as 16,5,4 or 8,4,2,6")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("results/tau.json"))
    args = parser.parse_args()
    config = BenchConfig(args.target, args.head, args.dataset, policies=(), dtype=args.dtype, pack=True)
    models = BenchModels.load(config)
    rows = []
    for tree in args.shapes:
        taus: dict[str, float] = {}
        for source in args.dataset:
            dialogues = read_dialogues(source)[: args.limit]
            prompts = [dialogue.prompt(models.tokenizer).input_ids for dialogue in dialogues]
            emitted, forwards = tokens_and_forwards(models, prompts, tree, args.max_new_tokens)
            taus[Path(source).stem] = round(emitted / forwards, 3)
            print(f"{tree} {Path(source).stem}: {taus[Path(source).stem]}", flush=True)
        rows.append({"shape": str(tree), "tau": taus, "mean": round(sum(taus.values()) / len(taus), 3)})
        print(f"{tree} mean: {rows[-1]['mean']}", flush=True)
    facts = {**identity_of(config, models), "arguments": vars(args), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
