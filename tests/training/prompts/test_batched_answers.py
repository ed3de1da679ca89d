"""Prompts of unequal lengths are answered together as each would be alone."""

import pytest
import torch

from prompts.batched_answers import answer, batches
from tests.conftest import build_target
from transformers_resps import DraftHead, attach


@pytest.mark.parametrize("drafts_with_a_head", [False, True])
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "eager"), ("gemma2", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3_text", "sdpa")],
)
def test_greedy_answers_are_those_of_plain_generate_to_each_prompt_alone(
    model_type: str, attention: str, drafts_with_a_head: bool
) -> None:
    extra = {} if model_type == "llama" else {"sliding_window": 8, "head_dim": 8}
    model = build_target(model_type, initializer_range=0.4, attn_implementation=attention, **extra)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (7, 3, 9, 12, 7, 5)]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        alone.append(out[0, len(prompt) :].tolist())
    ends = sorted({2} | {tokens[len(tokens) // 2] for tokens in alone[:2]})  # so that some rows end early
    model.generation_config.eos_token_id = ends
    torch.manual_seed(1)
    head = DraftHead.from_target(model) if drafts_with_a_head else None
    answers = answer(attach(model), head, prompts, 0.0, 20, seed=0)
    for found, plain in zip(answers, alone, strict=True):
        length = next((i for i, token in enumerate(plain) if token in ends), len(plain) - 1) + 1
        assert found == plain[:length]


def test_sampled_answers_are_those_of_the_seed() -> None:
    model = attach(build_target("llama", initializer_range=0.4))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    first, second, other = (answer(model, None, prompts, 0.9, 12, seed) for seed in (3, 3, 4))
    assert first == second != other


def test_a_batch_holds_prompts_of_one_temperature_and_similar_lengths() -> None:
    prompts = ["a" * (number * 7 % 31 + 1) for number in range(31)]
    found = batches(prompts, len, [0.0, 0.0, 0.8], 8, seed=0)
    assert sorted(prompt for _, group in found for prompt in group) == sorted(prompts)
    assert {number: temperature for temperature, group in found for number in map(len, group)} == {
        len(prompt): (0.0, 0.0, 0.8)[place % 3] for place, prompt in enumerate(prompts)
    }
    sizes = sorted(len(group) for _, group in found)
    assert sizes == [5, 5, 7, 7, 7]  # as even as possible: a small batch costs nearly as much as a full one
    greedy = sorted((min(map(len, group)), max(map(len, group))) for temperature, group in found if not temperature)
    assert all(end < start for (_, end), (start, _) in zip(greedy, greedy[1:], strict=False))
    assert found == batches(prompts, len, [0.0, 0.0, 0.8], 8, seed=0) != batches(prompts, len, [0.0, 0.0, 0.8], 8, 1)
