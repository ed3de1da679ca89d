"""Rows of a batch advance on their own or together: plain `generate` is the oracle, and so is every row alone."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.decoding.rows import WIDE, AnyShape, prompts, speculate, uneven_steps
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, Observation, TreeShape, attach
from transformers_resps.decoding.text import Batch
from transformers_resps.policies.base import mean_odds


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_greedy_rows_write_what_the_plain_batch_writes(architecture: Architecture) -> None:
    model = attach(architecture.build(architecture.attention[0]))
    torch.manual_seed(1)
    drafter = DraftHead.from_target(model)
    for seed in (0, 1, 4, 9):  # with the latter two rows that differ in length take plain steps in windows
        inputs = prompts(seed)
        options = {"max_new_tokens": 16, "eos_token_id": [2, 6]}
        plain = model.generate(**inputs, **options)
        tree = speculate(model, inputs, assistant_model=drafter, policy=AnyShape(seed), **options)
        assert tree.sequences.tolist() == plain.tolist()


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "several end tokens": {"eos_token_id": [2, 6, 12]},
    "one token": {"max_new_tokens": 1},
    "a length that some rows reach in the middle of a tree": {"max_new_tokens": 7},
    "processors of length and text": {"repetition_penalty": 1.4, "min_new_tokens": 5, "no_repeat_ngram_size": 3},
    "an end token by force": {"forced_eos_token_id": 2},
    "a penalty by position": {"exponential_decay_length_penalty": (4, 1.2)},
    "a stop string": {"stop_strings": ["d", "fg"], "tokenizer": letter_tokenizer()},
    "a prompt in chunks": {"prefill_chunk_size": 4},
    "time enough": {"max_time": 600.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_hold_for_every_row(name: str, target: PreTrainedModel, head: DraftHead) -> None:
    accepted = 0
    for seed in range(3):
        inputs, options = prompts(seed), {"max_new_tokens": 20, **OPTIONS[name]}
        plain = target.generate(**inputs, **options)
        for policy in (FixedPolicy(WIDE), AnyShape(seed)):
            tree = speculate(target, inputs, assistant_model=head, policy=policy, **options)
            assert tree.sequences.tolist() == plain.tolist()
            accepted += sum(sum(step.accepted) for step in tree.speculation.steps)
    assert accepted > 0 or name == "one token", "no drafted token was ever accepted: nothing was shown"


def test_rows_without_an_end_token_all_reach_the_limit(endless: PreTrainedModel) -> None:
    drafter = DraftHead.from_target(endless)
    plain = endless.generate(**prompts(0), max_new_tokens=15)
    tree = speculate(endless, prompts(0), assistant_model=drafter, policy=FixedPolicy(WIDE), max_new_tokens=15)
    assert tree.sequences.tolist() == plain.tolist()
    assert uneven_steps(tree.speculation) > 0


def test_rows_of_a_batch_write_what_they_write_alone(target: PreTrainedModel, head: DraftHead) -> None:
    inputs = prompts(5)
    together = speculate(target, inputs, assistant_model=head, policy=FixedPolicy(WIDE), eos_token_id=[2, 6])
    longest = together.sequences.shape[1]
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        alone = target.generate(ids[mask == 1][None], max_new_tokens=24, eos_token_id=[2, 6])[0]
        answer = alone[int(mask.sum()) :].tolist()
        assert together.sequences[row, 9 : 9 + len(answer)].tolist() == answer
        assert together.sequences[row, 9 + len(answer) :].tolist() == [0] * (longest - 9 - len(answer))
        assert sum(step.emitted[row] for step in together.speculation.steps) == len(answer)


def test_lookups_alone_serve_a_ragged_batch(target: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4, 5, 6] * 4, list(range(1, 17)), [7, 8] * 8])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = target.generate(**inputs, max_new_tokens=40)
    tree = speculate(target, inputs, policy=FixedPolicy(TreeShape(1, 0, 1, lookup=6)), max_new_tokens=40)
    assert tree.sequences.tolist() == plain.tolist()
    assert uneven_steps(tree.speculation) > 0


def test_the_row_that_lags_behind_weighs_most(endless: PreTrainedModel) -> None:
    """Four tokens behind count e times as much; the mean weight is one."""

    class Asked(FixedPolicy):
        row_weights: list[list[float]] = []

        def choose(self, observation: Observation) -> TreeShape:
            self.row_weights.append(list(observation.row_weights))
            return super().choose(observation)

    policy = Asked(WIDE)
    report = speculate(endless, prompts(0), assistant_model=DraftHead.from_target(endless), policy=policy).speculation
    written = [1] * 4  # the prefill's
    for step, found in zip(report.steps[1:], policy.row_weights, strict=True):
        going_on = [count for count in written if count < 24]
        weights = [math.exp(-count / 4.0) for count in going_on]
        assert found == pytest.approx([len(weights) * weight / sum(weights) for weight in weights])
        written = [before + count for before, count in zip(written, step.emitted, strict=True)]
    assert uneven_steps(report) > 0


def test_rows_in_lockstep_weigh_the_same(endless: PreTrainedModel) -> None:
    class Asked(FixedPolicy):
        def choose(self, observation: Observation) -> TreeShape:
            assert list(observation.row_weights) == [1.0] * 4
            return super().choose(observation)

    drafter = DraftHead.from_target(endless)
    speculate(endless, prompts(0), assistant_model=drafter, policy=Asked(WIDE), lockstep=True)


def test_lookups_count_as_much_as_the_rows_that_they_help() -> None:
    """By hand: two rows, of which the second knows two tokens and lags behind, or runs ahead."""
    odds = [[0.4], [0.8, 0.6]]
    for lengths, expected in (((9, 9), [0.6, 0.3]), ((13, 9), [0.692, 0.439]), ((9, 13), [0.508, 0.161])):
        batch = SimpleNamespace(in_lockstep=False, shortest=min(lengths))
        batch._texts, batch._decoded = [SimpleNamespace(length=length) for length in lengths], [0, 1]
        row_weights = Batch.row_weights.fget(batch)  # type: ignore[attr-defined]  # of a property
        assert mean_odds(odds, row_weights) == pytest.approx(expected, abs=0.001)


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


@pytest.mark.parametrize("do_sample", [False, True])
def test_finished_rows_cost_nothing(target: PreTrainedModel, head: DraftHead, do_sample: bool) -> None:
    seen: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    try:
        set_seed(1)
        inputs, options = prompts(1), {"do_sample": do_sample, "eos_token_id": [2, 6]}
        out = speculate(target, inputs, assistant_model=head, policy=FixedPolicy(WIDE), **options)
    finally:
        hook.remove()
    unfinished = [4, *(step.decoded_rows for step in out.speculation.steps[1:])]
    assert seen == unfinished
    assert seen[-1] < 4, "all rows ended together: nothing was shown"
    assert out.speculation.tau == out.speculation.emitted_total / sum(
        step.decoded_rows for step in out.speculation.steps
    )


def test_the_head_drafts_for_unfinished_rows_only(target: PreTrainedModel, head: DraftHead) -> None:
    class Watching(FixedPolicy):
        rows: list[int] = []

        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
            self.rows.append(len(scores))
            return super().size(scores, levels)

    policy = Watching(WIDE)
    out = speculate(target, prompts(1), assistant_model=head, policy=policy, eos_token_id=[2, 6])
    drafted = [step.decoded_rows for step in out.speculation.steps[1:] if step.shape.asks_head]
    assert policy.rows == drafted and policy.rows[-1] < 4


def test_a_finished_row_that_stays_says_nothing_about_the_head(target: PreTrainedModel) -> None:
    """A head that proposes every token but the padding, so it drafts whatever a row that goes on writes."""
    drafter = DraftHead.from_target(target, draft_token_ids=torch.arange(1, VOCABULARY))
    options = {"output_scores": True, "suppress_tokens": [0], "eos_token_id": [2, 6]}  # the first keeps rows together
    policy = FixedPolicy(TreeShape(VOCABULARY, 1, VOCABULARY))
    policy.needs_drafted_match = True
    steps = speculate(target, prompts(1), assistant_model=drafter, policy=policy, **options).speculation.steps
    drafted = [step for step in steps if step.shape.asks_head]
    assert min(step.decoded_rows for step in drafted) < 4, "no row ended before the others: nothing was shown"
    assert all(step.drafted_match == (1,) for step in drafted)
