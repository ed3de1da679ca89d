"""Sampled rows: in lockstep they keep the seed, in a ragged batch the distribution."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.decoding.rows import WIDE, prompts, speculate, uneven_steps
from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


@pytest.mark.parametrize("seed", range(4))
def test_sampled_rows_in_lockstep_keep_the_seed(target: PreTrainedModel, head: DraftHead, seed: int) -> None:
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "eos_token_id": [2, 6]}
    set_seed(seed)
    plain = target.generate(**prompts(seed), max_new_tokens=24, **options)
    set_seed(seed)
    tree = speculate(target, prompts(seed), assistant_model=head, policy=FixedPolicy(WIDE), **options)
    assert tree.sequences.tolist() == plain.tolist()
    assert uneven_steps(tree.speculation) == 0


def test_sampled_rows_of_a_ragged_batch_keep_the_distribution() -> None:
    """Two tokens after each of two prompts, against the exact distribution: chi-square over all pairs."""
    tiny = attach(Architecture("llama", {"vocab_size": 5}).build("sdpa"))
    starts = torch.tensor([[1, 2, 4], [0, 3, 1]])
    rows = starts.repeat(100, 1)
    inputs = {"input_ids": rows, "attention_mask": (rows != 0).long()}
    policy = FixedPolicy(TreeShape(12, 2, 5))  # all first tokens, some second ones
    tree = {"assistant_model": DraftHead.from_target(tiny), "policy": policy, "lockstep": False}
    set_seed(0)
    counts: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    uneven = 0
    for _ in range(4):
        out = speculate(tiny, inputs, **tree, do_sample=True, top_k=3, max_new_tokens=5)
        uneven += uneven_steps(out.speculation)
        for row, answer in enumerate(out.sequences[:, 3:5].tolist()):
            counts[row % 2][tuple(answer)] += 1
    assert uneven > 0
    for start, seen in zip(starts, counts, strict=True):
        expected = exact_pairs(tiny, start[start != 0])
        assert set(seen) <= set(expected)
        total = sum(seen.values())
        statistic = sum((seen[pair] - total * p) ** 2 / (total * p) for pair, p in expected.items())
        assert statistic < 26.1, "chi-square of 8 degrees of freedom at 0.001"


def exact_pairs(target: Any, prompt: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every two tokens after a prompt, under top-k 3."""

    def likely(ids: torch.Tensor) -> list[tuple[int, float]]:
        with torch.no_grad():
            best = target(input_ids=ids[None]).logits[0, -1].topk(3)
        return list(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    return {
        (first, second): p * q
        for first, p in likely(prompt)
        for second, q in likely(torch.cat([prompt, torch.tensor([first])]))
    }
