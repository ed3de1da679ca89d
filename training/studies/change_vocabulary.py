"""Give a head another draft vocabulary, without training.

Question: may a head get another draft vocabulary without training?
Answer: yes, if its output head was frozen. Its rows are the target's own, so any other rows of the target fit the same
hidden states. Count tokens on the target's outputs and on other conversations: a vocabulary counted from few tokens
misses words of the next text, and acceptance cannot exceed its coverage (`LOG.md` has the table).

    python -m training.studies.change_vocabulary --target work/smollm2 --head model_cards/smollm2-135m-instruct-head \
        --texts work/answers2.jsonl sharegpt.json --size 12288 --output work/head-start

Every file of `--texts` has the same weight, whatever its size.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transformers_resps import DraftHead
from transformers_resps.data import load_conversations, training_prompts_of, write_training_prompts


_TEXTS_AT_ONCE = 256


def token_shares(file: Path, tokenizer: Any, vocab_size: int, limit: int) -> Tensor:
    """How often the assistant of `file` writes each token, `[v]`, as shares of all it writes."""
    counts = torch.zeros(vocab_size)
    texts = [
        message["content"]
        for conversation in islice(load_conversations(str(file)), limit)
        for message in conversation
        if message["role"] == "assistant"
    ]
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for ids in tokenizer(texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False)["input_ids"]:
            counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
    return counts / counts.sum().clamp(min=1)


def change_vocabulary(head: DraftHead, target: PreTrainedModel, token_ids: Tensor) -> None:
    """Let `head` propose `token_ids` `[d]`, by the target's own output rows.

    Raises:
        ValueError: the head's rows are not its target's: they were trained, and other tokens have none.
    """
    rows = target.get_output_embeddings().weight.detach()
    if head.config.draft_vocab_size is None or not torch.equal(head.lm_head.weight, rows[head.draft_token_ids]):
        raise ValueError(
            "The head's output rows are not those of its target, but tokens outside its vocabulary have no others. "
            "Train a head with `freeze_output_head: true`, or keep its vocabulary."
        )
    token_ids = token_ids.sort().values
    head.config.draft_vocab_size = len(token_ids)
    head.lm_head = nn.Linear(rows.shape[1], len(token_ids), bias=False, dtype=rows.dtype)
    head.lm_head.weight.data.copy_(rows[token_ids])
    head.d2t = token_ids - torch.arange(len(token_ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model id or folder")
    parser.add_argument("--head", required=True, help="head id or folder")
    parser.add_argument("--texts", required=True, nargs="+", type=Path, help="conversations to count, .json or .jsonl")
    parser.add_argument("--limit", type=int, default=6000, help="most conversations of each file")
    parser.add_argument("--size", required=True, type=int, help="tokens of the new vocabulary")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16)
    head = DraftHead.from_pretrained(args.head, target=target)
    shares = torch.stack([token_shares(file, tokenizer, head.config.vocab_size, args.limit) for file in args.texts])
    weights = shares.mean(0)
    weights[tokenizer.all_special_ids] = 1.0  # the ends of text and turn
    change_vocabulary(head, target, weights.topk(args.size).indices)
    for file, share in zip(args.texts, shares, strict=True):
        print(
            f"{file}: {args.size} tokens cover {float(share[head.draft_token_ids].sum()):.2%} of what is written there"
        )
    head.save_pretrained(args.output)
    if earlier := training_prompts_of(args.head):
        write_training_prompts(args.output, (), earlier=earlier)


if __name__ == "__main__":
    main()
