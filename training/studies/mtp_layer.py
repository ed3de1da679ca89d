"""Compare an MTP layer with a draft head of the same training, by simulated tau.

Question: does a layer like the target's own draft as well as an EAGLE-3 head that was trained on the same tokens?
Answer: nearly. After 205,000 positions of training SmolLM2's layer reaches a tau of 1.65 with the tree 16/4/4 and the
head 1.70, on four benchmarks; with a chain of four tokens 1.31 and 1.37 (`LOG.md`).

    python -m training.studies.mtp_layer work/smollm2 model_cards/smollm2-135m-instruct-mtp work/head_same/head \
        model_cards/smollm2-135m-instruct-head --dataset eval/mt_bench.jsonl eval/gsm8k.jsonl eval/humaneval.jsonl \
        eval/alpaca.jsonl --limit 6 --max-new-tokens 80 --shapes 16,4,4 5,4,1 --output smollm2-mtp.json

The head of the same training:

    python training/train_head.py --config training/recipes/smollm2_135m_instruct_mtp.yaml --new_head eagle3 \
        --output_dir work/head_same

Method: the target answers the first prompts of each file greedily, once; what each module drafts with a tree is then
simulated on these answers, as in training. Nothing is timed, so other work may run at the same time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from training.benchmarking.provenance import code
from transformers_resps import TreeShape
from transformers_resps.drafting import TrainableSource
from transformers_resps.tools.cli import positive, shape
from transformers_resps.tools.doctor import LabelledText, write_answers
from transformers_resps.tools.loading import load_target
from transformers_resps.tools.results import machine
from transformers_resps.tools.session import read_dialogues
from transformers_resps.trainers.features import FrozenTarget
from transformers_resps.trainers.loading import read_head
from transformers_resps.trainers.tau import simulated_tau


def simulated(target: Any, source: TrainableSource, answers: list[LabelledText], tree: TreeShape) -> float:
    """Tau of a tree on answers that the target wrote."""
    reader = FrozenTarget(target, source.feature_layers)
    texts: list[dict[str, Tensor]] = [
        {
            "input_ids": answer.tokens,
            "loss_mask": torch.arange(len(answer.tokens)) >= answer.prompt_length,
            "features": reader.read(answer.tokens[None]).features[0],
        }
        for answer in answers
    ]
    return round(simulated_tau(source, target, texts, tree), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("modules", nargs="+", help="folders or Hub ids of draft heads and MTP layers for the target")
    parser.add_argument("--dataset", nargs="+", required=True, help=".jsonl or .json with turns, messages or prompt")
    parser.add_argument("--limit", type=positive, default=8, help="the first prompts of each file")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[TreeShape(16, 4, 4)], help="as 16,4,4")
    parser.add_argument("--max-new-tokens", type=positive, default=96)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("results/mtp.json"))
    args = parser.parse_args()
    tokenizer, target = AutoTokenizer.from_pretrained(args.target), load_target(args.target, args.dtype, packed=True)
    answers = {}
    for file in args.dataset:
        prompts = [one.prompt(tokenizer).input_ids for one in read_dialogues(file)[: args.limit]]
        answers[Path(file).stem] = write_answers(target, prompts, args.max_new_tokens)
    rows = []
    for name in args.modules:
        source = read_head(name, target)
        for tree in args.shapes:
            taus = {file: simulated(target, source, texts, tree) for file, texts in answers.items()}
            mean = round(sum(taus.values()) / len(taus), 3)
            rows.append({"module": Path(name).name, "kind": type(source).__name__, "shape": str(tree), "tau": taus})
            rows[-1] |= {"mean": mean, "source": source.identity()}
            print(f"{name} {tree}: {mean} {taus}", flush=True)
    facts = {**machine(target), **code(), "arguments": vars(args), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
