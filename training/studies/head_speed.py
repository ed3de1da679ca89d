"""Tokens per second of head training, straightforward and ours, on the same batch.

    python -m training.studies.head_speed --target work/smollm2 --length 384 --rows 4 --steps 4

Straightforward: the dense `[(k + 1) t]` mask, all logits of all levels alive until one backward, the target's whole
vocabulary for every level, output head trained. Ours: `unroll` and `soft_cross_entropy`.
The target's own forward is left out of both: it is cached in practice.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from transformers_resps import DraftHead
from transformers_resps.head import BoundHead
from transformers_resps.trainers.soft_cross_entropy import soft_cross_entropy
from transformers_resps.trainers.target_features import FrozenTarget, TargetFeatures
from transformers_resps.trainers.training_time_test import unroll


def dense_unroll(head: DraftHead, features: Tensor, embeddings: Tensor, steps: int) -> list[Tensor]:
    length = features.shape[1]
    order, hidden, outputs = torch.arange(length), head.fuse(features), []
    kept: list[tuple[Tensor, Tensor]] = []
    for level in range(steps):
        columns = torch.arange((level + 1) * length)
        mask = (columns < length) & (columns <= order[:, None])
        mask |= (columns >= length) & (columns % length == order[:, None])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            kept.append((k, v))
            keys, values = (torch.cat(part, dim=2) for part in zip(*kept, strict=True))
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

        tokens = F.pad(embeddings[:, level + 1 :], (0, 0, 0, level + 1))
        hidden = head(hidden, tokens, order[None] + level, attend)
        outputs.append(head.norm(hidden))
    return outputs


def straightforward(head: DraftHead, target: FrozenTarget, ids: Tensor, read: TargetFeatures, steps: int) -> Tensor:
    embeddings = BoundHead(head, target.model).embed(ids)
    total = torch.zeros(())
    for level, normed in enumerate(dense_unroll(head, read.features, embeddings, steps)):
        with torch.no_grad():
            full = F.linear(read.hidden[:, level + 1 :], target.output_weight)
            wanted = torch.isin(full.argmax(-1), head.draft_token_ids)
            probabilities = full[..., head.draft_token_ids].softmax(-1)
        log_probs = head.lm_head(normed[:, : normed.shape[1] - level - 1]).log_softmax(-1)
        total = total - 0.8**level * ((probabilities * log_probs).sum(-1) * wanted).sum()
    return total


def ours(head: DraftHead, target: FrozenTarget, ids: Tensor, read: TargetFeatures, steps: int) -> Tensor:
    bound = BoundHead(head, target.model)
    hidden = unroll(head, read.features, bound.embed(ids), steps)
    rows, places = torch.ones_like(ids[:, 2:]).nonzero(as_tuple=True)
    levels = torch.arange(steps)[:, None]
    picked = hidden[levels, rows, (places - levels).clamp(min=0)]
    weights = 0.8**levels * (places >= levels) * torch.isin(read.picks[rows, places + 1], head.draft_token_ids)
    teacher = target.teacher(read.hidden[rows, places + 1], head.draft_token_ids)
    return soft_cross_entropy(picked, bound.output_weight, teacher, weights.float())[0]


def measure(name: str, loss: Callable[[], Tensor], tokens: int, repeats: int) -> None:
    loss().backward()
    started = time.perf_counter()
    for _ in range(repeats):
        loss().backward()
    rate = repeats * tokens / (time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {rate:.0f} tokens/s, peak memory so far {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    head = DraftHead.from_target(model, draft_vocab_size=args.draft_vocab_size)
    target = FrozenTarget(model, list(head.config.feature_layers or []))
    ids = torch.randint(0, args.draft_vocab_size, (args.rows, args.length))
    read, tokens = target.read(ids), args.rows * args.length
    head.lm_head.requires_grad_(False)
    measure("ours, frozen output head", lambda: ours(head, target, ids, read, args.steps), tokens, args.repeats)
    head.lm_head.requires_grad_(True)
    measure("ours, trained output head", lambda: ours(head, target, ids, read, args.steps), tokens, args.repeats)
    measure("straightforward", lambda: straightforward(head, target, ids, read, args.steps), tokens, args.repeats)


if __name__ == "__main__":
    main()
