"""Tokens per second of `generate_dataset.py` and of plain `generate`, one prompt at a time, in turn.

    python -m training.studies.generation_speed --target work/smollm2 --prompts sharegpt.json --dtype float32

Both answer greedily. The batches are the first ones that `generate_dataset.py` would decode; of each, plain `generate`
answers the first few. Load and clock drift hit both alike, because they alternate.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_resps.generation.sequences import end_ids

from ..generate_dataset import Prompt, batches, read_prompts
from ..prompts.batched_answers import answer


def plain(model: Any, prompts: list[Prompt], max_new_tokens: int) -> int:
    """Answer one by one; how many tokens that made."""
    made = 0
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids], device=model.device)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
        made += out.shape[1] - ids.shape[1]
    return made


def batched(model: Any, prompts: list[Prompt], max_new_tokens: int) -> int:
    """Answer all at once; how many tokens that made."""
    token_ids = [prompt.token_ids for prompt in prompts]
    return sum(map(len, answer(model, token_ids, 0.0, max_new_tokens, end_ids(model), seed=0)))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model id or folder")
    parser.add_argument("--prompts", required=True, action="append", type=Path, help=".json or .jsonl")
    parser.add_argument("--limit", type=int, default=4000, help="most prompts to form batches from")
    parser.add_argument("--rounds", type=int, default=4, help="batches to measure")
    parser.add_argument("--singles", type=int, default=4, help="prompts of each batch that plain generate answers")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=224)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="a torch dtype name, or auto")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype).eval()
    prompts = read_prompts(args.prompts, tokenizer, args.max_prompt_tokens, args.limit, seed=0)
    groups = batches(prompts, args.batch_size, seed=0)
    print(f"{len(prompts)} prompts in {len(groups)} batches, {len(prompts) / len(groups):.1f} on average")
    plain(model, groups[0][:1], 4)  # the first call pays for more than its own tokens
    totals = {"plain": [0.0, 0.0], "batched": [0.0, 0.0]}
    for group in groups[: args.rounds]:
        for name, decode, chosen in (("plain", plain, group[: args.singles]), ("batched", batched, group)):
            started = time.perf_counter()
            made = decode(model, chosen, args.max_new_tokens)
            seconds = time.perf_counter() - started
            totals[name][0] += made
            totals[name][1] += seconds
            print(f"{name}: {len(chosen)} prompts, {made} tokens, {made / seconds:.1f} tokens/s", flush=True)
    slow, fast = (made / seconds for made, seconds in totals.values())
    print(f"plain {slow:.1f} tokens/s, batched {fast:.1f} tokens/s: {fast / slow:.1f} times as fast")


if __name__ == "__main__":
    main()
