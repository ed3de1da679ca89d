"""Rows of a batch that advance each on its own: the plain call is the oracle, and so is every row alone."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, Observation, Policy, TreeShape, attach
from transformers_resps.cache import keep_rows, place_nodes
from transformers_resps.lockstep import advance_together
from transformers_resps.prefix import Prefix


WIDE = TreeShape(40, 3, VOCABULARY)
CPU = torch.device("cpu")


class AnyShape(Policy):
    """Another tree at every step, with lookups and plain steps among them."""

    needs_head = False

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def _number(self, high: int) -> int:
        return int(torch.randint(0, high, (), generator=self.generator))

    def choose(self, observation: Observation) -> TreeShape:
        shape = (1 + self._number(40), self._number(5), 1 + self._number(VOCABULARY))
        return TreeShape(*shape, lookup=self._number(2) * self._number(5))


def prompts(seed: int, rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Random rows, padded on the left to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    pads = torch.randint(0, length, (rows, 1), generator=generator)
    mask = (torch.arange(length) >= pads).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))


@pytest.fixture(scope="module")
def endless() -> PreTrainedModel:
    """Without an end token."""
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


def uneven_steps(report: Any) -> int:
    """Steps in which two rows gained different numbers of tokens and went on afterwards."""
    return sum(
        len({count for count, later in zip(step.emitted, following.emitted, strict=True) if later}) > 1
        for step, following in pairwise(report.steps)
    )


def speculate(target: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": 24} | options)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_greedy_rows_write_what_the_plain_batch_writes(architecture: Architecture) -> None:
    model = attach(architecture.build(architecture.attention[0]))
    torch.manual_seed(1)
    drafter = DraftHead.from_target(model)
    for seed in range(2):
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
        assert sum(step.emitted_by(row) for step in together.speculation.steps) == len(answer)


def test_lookups_alone_serve_rows_that_advance_apart(target: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 4, 5, 6] * 4, list(range(1, 17)), [7, 8] * 8])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = target.generate(**inputs, max_new_tokens=40)
    tree = speculate(target, inputs, policy=FixedPolicy(TreeShape(1, 0, 1, lookup=6)), max_new_tokens=40)
    assert tree.sequences.tolist() == plain.tolist()
    assert uneven_steps(tree.speculation) > 0


# --- rows that have finished ----------------------------------------------------------------------------------------


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
    assert out.speculation.tau == out.speculation.emitted / sum(step.decoded_rows for step in out.speculation.steps)


def test_the_head_drafts_for_unfinished_rows_only(target: PreTrainedModel, head: DraftHead) -> None:
    class Watching(FixedPolicy):
        rows: list[int] = []

        def size(self, scores: torch.Tensor) -> int:
            self.rows.append(len(scores))
            return super().size(scores)

    policy = Watching(WIDE)
    out = speculate(target, prompts(1), assistant_model=head, policy=policy, eos_token_id=[2, 6])
    drafted = [step.decoded_rows for step in out.speculation.steps[1:] if step.shape.asks_head]
    assert policy.rows == drafted and policy.rows[-1] < 4


def test_a_finished_row_that_stays_says_nothing_about_the_head(target: PreTrainedModel) -> None:
    """A head that proposes every token but the padding, so it foresees whatever a row that goes on writes."""
    drafter = DraftHead.from_target(target, draft_token_ids=torch.arange(1, VOCABULARY))
    options = {"output_scores": True, "suppress_tokens": [0], "eos_token_id": [2, 6]}  # the first keeps rows together
    policy = FixedPolicy(TreeShape(VOCABULARY, 1, VOCABULARY))
    policy.reads_foreseen = True
    steps = speculate(target, prompts(1), assistant_model=drafter, policy=policy, **options).speculation.steps
    drafted = [step for step in steps if step.shape.asks_head]
    assert min(step.decoded_rows for step in drafted) < 4, "no row ended before the others: nothing was shown"
    assert {step.foreseen for step in drafted} == {1}


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_sampled_rows_stay_together_and_keep_the_seed(target: PreTrainedModel, head: DraftHead, seed: int) -> None:
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "eos_token_id": [2, 6]}
    set_seed(seed)
    plain = target.generate(**prompts(seed), max_new_tokens=24, **options)
    set_seed(seed)
    tree = speculate(target, prompts(seed), assistant_model=head, policy=FixedPolicy(WIDE), **options)
    assert tree.sequences.tolist() == plain.tolist()
    assert uneven_steps(tree.speculation) == 0


def test_sampled_rows_that_advance_apart_keep_the_distribution() -> None:
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


# --- what keeps rows together ---------------------------------------------------------------------------------------


class EveryThird(LogitsProcessor):
    """Stateful: forbids the best token of all rows at every third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        return scores if self.calls % 3 else scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


class StopAtTogether(StoppingCriteria):
    """Stops all rows once the first tokens of all of them add up."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), int(input_ids.sum()) > 250)


def count_rows(row: int, ids: torch.Tensor) -> list[int]:
    return [(row + int(ids[-1])) % VOCABULARY, (row + 3) % VOCABULARY]


COUPLED: dict[str, dict[str, Any]] = {
    "EveryThird": {"logits_processor": lambda: LogitsProcessorList([EveryThird()])},
    "StopAtTogether": {"stopping_criteria": lambda: StoppingCriteriaList([StopAtTogether()])},
    "PrefixConstrained": {"prefix_allowed_tokens_fn": lambda: count_rows},
    "guidance": {"guidance_scale": lambda: 1.5},
    "output_scores": {"output_scores": lambda: True},
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_looks_across_rows_keeps_them_together(name: str, target: PreTrainedModel, head: DraftHead) -> None:
    inputs = prompts(3)
    if name == "guidance":  # Transformers' own processor needs rows without padding
        inputs = {"input_ids": inputs["input_ids"].clamp(min=1)}

    def call(**extra: Any) -> Any:
        made = {option: make() for option, make in COUPLED[name].items()}
        return speculate(target, inputs, max_new_tokens=12, **made, **extra)

    tree = {"assistant_model": head, "policy": FixedPolicy(WIDE)}
    plain, out = call(), call(**tree)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert uneven_steps(out.speculation) == 0
    if name == "output_scores":
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="rows advance each on its own only where nothing can tell"):
        call(**tree, lockstep=False)


def test_rows_that_go_on_after_their_stop_string_stay_together(endless: PreTrainedModel) -> None:
    """Without an end token plain decoding does not pad: a row that has stopped goes on until all have."""
    options = {"stop_strings": ["d"], "tokenizer": letter_tokenizer(), "max_new_tokens": 12}
    plain = endless.generate(**prompts(3), **options)
    tree = {"assistant_model": DraftHead.from_target(endless), "policy": FixedPolicy(WIDE)}
    out = speculate(endless, prompts(3), **options, **tree)
    assert out.sequences.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="without an end token"):
        speculate(endless, prompts(3), **options, **tree, lockstep=False)


def test_a_caller_may_keep_greedy_rows_together(target: PreTrainedModel, head: DraftHead) -> None:
    apart, together = (
        speculate(target, prompts(0), assistant_model=head, policy=FixedPolicy(WIDE), lockstep=lockstep)
        for lockstep in (None, True)
    )
    assert apart.sequences.tolist() == together.sequences.tolist()
    assert uneven_steps(apart.speculation) > 0 == uneven_steps(together.speculation)
    assert apart.speculation.target_forwards < together.speculation.target_forwards


def test_rows_advance_together_where_sampling_or_the_caller_or_a_reason_says_so() -> None:
    assert not advance_together(None, do_sample=False, reason=None)
    assert advance_together(None, do_sample=True, reason=None)
    assert advance_together(True, do_sample=False, reason=None)
    assert not advance_together(False, do_sample=True, reason=None)
    assert advance_together(None, do_sample=False, reason="a processor")


def test_lockstep_without_trees_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="without a draft head or a policy"):
        target.generate(**prompts(0), lockstep=False)


# --- slots ----------------------------------------------------------------------------------------------------------


def test_sliding_layers_hold_the_last_entries_of_every_row() -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=5))
    cache.activate_past_recording()
    states = torch.arange(2 * 6).view(2, 1, 6, 1).float()  # six entries in each row, of which a window shows four
    cache.update(states, states, 0)
    cache.crop(0)
    nodes = torch.tensor([[20.0, 21, 22], [30, 31, 32]])[:, None, :, None]
    cache.update(nodes, nodes, 0)
    place_nodes(cache, torch.tensor([[0, 2], [0, 0]]), 3, torch.tensor([[6, 7], [6, 6]]), 8)
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[4, 5, 20, 22], [9, 10, 11, 30]]
    assert cache.get_seq_length() == 8
    keep_rows(cache, [1], 7)
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[9, 10, 11, 30]]
    assert cache.get_seq_length() == 7


def test_every_row_goes_on_at_its_own_end() -> None:
    prefix = Prefix(torch.tensor([[0, 1], [1, 1], [1, 1]]))
    prefix.extend([2, 2, 2])
    assert prefix.is_even and prefix.length == 2
    assert prefix.slots([1, 3, 2], CPU).tolist() == [[2, 2, 2], [2, 3, 4], [2, 3, 3]]
    prefix.extend([1, 3, 2])
    assert not prefix.is_even and prefix.length == 5
    assert prefix.slots([2, 1, 1], CPU).tolist() == [[3, 4], [5, 5], [4, 4]]
    seen = prefix.visible(6, CPU)
    assert seen is not None
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]
    prefix.keep_rows([0, 2])
    assert prefix.length == 4 and not prefix.is_even
    prefix.keep_rows([0])
    assert prefix.length == 3 and prefix.is_even


def test_rows_without_padding_that_end_alike_need_no_mask() -> None:
    prefix = Prefix(None)
    prefix.extend([4, 4])
    prefix.extend([1, 3])
    assert prefix.visible(7, CPU) is not None
    prefix.extend([3, 1])
    assert prefix.is_even and prefix.visible(8, CPU) is None


def test_accepted_nodes_are_placed_behind_each_rows_own_entries() -> None:
    cache = DynamicCache()
    states = torch.arange(2 * 7).view(2, 1, 7, 1).float()  # three entries and a tree of four nodes in each row
    cache.update(states.clone(), states.clone(), 0)
    place_nodes(cache, torch.tensor([[0, 2], [0, 0]]), 4, torch.tensor([[3, 4], [2, 2]]), 5)
    kept = cache.layers[0].keys[:, 0, :, 0].tolist()
    assert kept == [[0, 1, 2, 3, 5], [7, 8, 10, 10, 11]], "row 1 had two entries; what is behind its third is hidden"
