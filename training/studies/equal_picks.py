"""Count how often a target in few bits picks the token that its bfloat16 weights pick.

Question: how many picks stay the same when a target is loaded in few bits?
Answer: for SmolLM2-135M, 96% in int8 and 71% in int4.

    python -m training.studies.equal_picks TARGET --prompts training/evidence/prompts.jsonl --each 2

The bfloat16 target answers prompts greedily. All targets then read these texts; counted are the positions of answers
whose highest logit is the same token.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from transformers_resps.tools.cli import QUANTIZATIONS
from transformers_resps.tools.loading import load_target


def questions(path: Path, each: int) -> list[str]:
    """Read the first `each` prompts of every category of a JSON lines file."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["category"]].append(row["turns"][0])
    return [question for several in found.values() for question in several[:each]]


@torch.inference_mode()
def answered(target: Any, tokenizer: Any, question: str, most: int) -> tuple[Tensor, int]:
    """Return the text `[1, s]` of a prompt with its greedy answer, and the length of the prompt."""
    message = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return target.generate(**prompt, do_sample=False, max_new_tokens=most), prompt["input_ids"].shape[1]


@torch.inference_mode()
def picks(target: Any, text: Tensor, start: int) -> Tensor:
    """Return the most probable token after each position of `text` `[1, s]`, from the last of the prompt on."""
    return target(text).logits[0, start - 1 : -1].argmax(-1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("equal_picks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `category` and `turns`")
    parser.add_argument("--each", type=int, default=2, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    whole = load_target(args.target, "bfloat16", "cpu")
    texts = [answered(whole, tokenizer, one, args.max_new_tokens) for one in questions(args.prompts, args.each)]
    own = [picks(whole, *text) for text in texts]
    count = sum(map(len, own))
    print(f"{len(texts)} prompts, {count} positions", file=sys.stderr)
    for kind in QUANTIZATIONS:
        other = load_target(args.target, "bfloat16", "cpu", quantization=kind)
        equal = sum(int((picks(other, *text) == mine).sum()) for text, mine in zip(texts, own, strict=True))
        print(f"{kind}: {equal / count:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
