"""Transformers' own type in both directions: our drafters in stock's loop, and anybody's generator in our trees."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    EarlyExitCandidateGenerator,
    MTPCandidateGenerator,
    PromptLookupCandidateGenerator,
)

from tests.conftest import build_target
from tests.lossless.answering import Heard
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.assistants import CausalDrafter
from transformers_resps.drafting import DraftCall, DraftSource
from transformers_resps.drafting.drafter import Drafter
from transformers_resps.drafting.mixed_drafter import together
from transformers_resps.drafting.suffix_memory import SuffixMemory


PROMPT = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 40}
CHAIN = FixedPolicy(TreeShape(7, 6, 1))


class Knows(CandidateGenerator):
    """Proposes the text itself, wrong at every fifth place; keeps what it was told."""

    def __init__(self, text: list[int]) -> None:
        self.text, self.told = text, list[tuple[int, int, int]]()

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.LongTensor, None]:  # type: ignore[override]
        length = input_ids.shape[1]
        guess = [token if place % 5 else (token + 1) % 64 for place, token in enumerate(self.text)]
        chain = torch.tensor([guess[length : length + 4]], dtype=torch.long)
        return torch.cat([input_ids, chain], dim=1), None  # type: ignore[return-value]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        self.told.append((input_ids.shape[1], scores.shape[1] - 1, num_matches))


class Answers(CandidateGenerator):
    """Returns what a function makes of the text, at first the text alone."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        self.answer, self.calls = answer, 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[Any, None]:  # type: ignore[override]
        self.calls += 1
        return (input_ids if self.calls < 4 else self.answer(input_ids)), None


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target()


def plain(target: PreTrainedModel, options: dict[str, Any]) -> list[list[int]]:
    torch.manual_seed(7)
    found: list[list[int]] = target.generate(PROMPT, **options).tolist()
    return found


def stock_with(target: PreTrainedModel, drafter: Drafter) -> PreTrainedModel:
    """The target, whose assisted decoding asks this drafter."""
    model = copy.deepcopy(target)
    model._get_candidate_generator = lambda **kwargs: drafter  # type: ignore[method-assign,assignment]
    return model


def small_model(target: PreTrainedModel) -> DraftSource:
    model = build_target(num_hidden_layers=1)
    SMALL.append(model)
    return CausalDrafter(model, target)


SMALL: list[PreTrainedModel] = []  # a source does not keep its model alive


def trained_head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0, 2]).eval()


def lookup(target: PreTrainedModel) -> DraftSource:
    return SuffixMemory()


@pytest.mark.parametrize("make", [trained_head, small_model, lookup])
def test_transformers_own_loop_runs_with_our_drafters(
    target: PreTrainedModel, make: Callable[[PreTrainedModel], DraftSource]
) -> None:
    drafter, asked = make(target).drafter(DraftCall(target)), list[int]()
    find = drafter.draft

    def counted(*given: Any) -> Any:
        pool = find(*given)
        asked.append(len(pool.levels))
        return pool

    drafter.draft = counted  # type: ignore[method-assign]
    found = stock_with(target, drafter).generate(PROMPT, **GREEDY, prompt_lookup_num_tokens=3)
    assert found.tolist() == plain(target, GREEDY)
    assert asked and max(asked) > 0


def test_several_drafters_make_one_chain_in_transformers_loop(target: PreTrainedModel) -> None:
    drafter = together([make(target).drafter(DraftCall(target)) for make in (trained_head, small_model)])
    assert drafter is not None and drafter.requires_model_outputs
    found = stock_with(target, drafter).generate(PROMPT, **GREEDY, prompt_lookup_num_tokens=3)
    assert found.tolist() == plain(target, GREEDY)


def test_a_head_that_reads_past_what_transformers_shows_says_so(target: PreTrainedModel) -> None:
    drafter = DraftHead.from_target(target, feature_layers=[1, 4]).drafter(DraftCall(target))
    with pytest.raises(ValueError, match=r"hidden state 4 before the final norm.*attached model"):
        stock_with(target, drafter).generate(PROMPT, **GREEDY, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", [CHAIN, FixedPolicy(TreeShape(12, 3, 2, lookup=3)), "auto", None], ids=str)
@pytest.mark.parametrize("with_head", [False, True])
def test_any_generator_drafts_in_our_tree(
    target: PreTrainedModel, with_head: bool, policy: Any, options: dict[str, Any]
) -> None:
    model = attach(copy.deepcopy(target))
    expected = plain(target, options)
    generator = Knows(expected[0])
    assistants = [trained_head(model), generator] if with_head else generator
    torch.manual_seed(7)
    out = model.generate(PROMPT, **options, assistant_model=assistants, policy=policy, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected
    assert policy == "auto" or generator.told, "it is told of its matches"
    assert all(matches <= verified <= 4 for _, verified, matches in generator.told)
    if policy is CHAIN and not with_head:
        assert out.speculation.mean_acceptance_length > 2
        for length, verified, matches in generator.told:  # all of the chain, or what was wrong came last
            assert matches == verified or (length - 1) % 5 == 0


@pytest.mark.parametrize("policy", [None, CHAIN])
def test_a_generator_that_attach_was_given_drafts_in_each_call(target: PreTrainedModel, policy: Any) -> None:
    expected = plain(target, GREEDY)
    model = attach(copy.deepcopy(target), assistant_model=Knows(expected[0]), policy=policy)
    for _ in range(2):
        out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
        assert out.sequences.tolist() == expected and out.speculation.mean_acceptance_length > 2
    assert model.generate(PROMPT, **GREEDY, policy="plain").tolist() == expected


def lookup_of_transformers(model: PreTrainedModel) -> CandidateGenerator:
    return PromptLookupCandidateGenerator(num_output_tokens=4, max_matching_ngram_size=2, max_length=60)


def early_exit(model: PreTrainedModel) -> CandidateGenerator:
    config = copy.deepcopy(model.generation_config)
    config.assistant_early_exit, config.min_length, config.max_length = 2, 0, 60
    given: dict[str, Any] = {"model_kwargs": {}, "logits_processor": LogitsProcessorList()}
    return EarlyExitCandidateGenerator(PROMPT, model, config, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("make", [lookup_of_transformers, early_exit])
def test_what_transformers_ships_drafts_in_our_tree(
    target: PreTrainedModel, make: Callable[[PreTrainedModel], CandidateGenerator], with_head: bool
) -> None:
    """Early exit calls `generate` of the target itself, which is plain then, whatever its defaults are."""
    model = attach(copy.deepcopy(target), policy=CHAIN)
    generator = make(model)
    assistants = [trained_head(model), generator] if with_head else generator
    out = model.generate(PROMPT, **GREEDY, assistant_model=assistants, return_dict_in_generate=True)
    assert out.sequences.tolist() == plain(target, GREEDY)
    assert sum(step.drafted for step in out.speculation.steps) > 0


def followed_by(text: Tensor, token: int) -> Tensor:
    return torch.cat([text, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda text: followed_by(text, 64), r"returned the token 64, but the target knows 0 to 63"),
        (lambda text: followed_by(text, -1), r"returned the token -1"),
        (lambda text: text.expand(2, -1), r"Answers returned a tensor \[2, \d+\] for one text"),
        (lambda text: text + 1, r"Answers returned another text than it was given"),
        (lambda text: text[:, :-1], r"Answers returned another text than it was given"),
        (lambda text: None, r"Answers returned None for one text"),
        (lambda text: {}["key"], r"Answers failed when it drafted: KeyError: 'key'"),
    ],
    ids=["vocabulary", "negative", "rows", "prefix", "short", "nothing", "raises"],
)
def test_a_wrong_answer_is_named_and_the_text_is_plains_up_to_there(
    target: PreTrainedModel, answer: Callable[[Tensor], Any], message: str
) -> None:
    model, streamer, generator = attach(copy.deepcopy(target)), Heard(), Answers(answer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.generate(PROMPT, **GREEDY, assistant_model=generator, policy=CHAIN, streamer=streamer)
    assert not streamer.ended, "the answer is not whole"
    expected, written = plain(target, GREEDY), [*streamer.values[0][0], *sum(streamer.values[1:], [])]
    assert len(written) > PROMPT.shape[1] + 2 and written == expected[0][: len(written)]
    generator.answer = lambda text: text
    found = model.generate(PROMPT, **GREEDY, assistant_model=generator, policy=CHAIN)
    assert found.tolist() == expected, "the next call goes on"


def test_a_generator_that_drafts_in_one_call_is_refused_in_another(target: PreTrainedModel) -> None:
    model = attach(copy.deepcopy(target))

    def generate() -> Tensor:
        found: Tensor = model.generate(PROMPT, **GREEDY, assistant_model=generator, policy=CHAIN)
        return found

    generator = Answers(lambda text: generate())
    with pytest.raises(RuntimeError, match=r"ValueError: This Answers drafts for another call now. Make one for each"):
        generate()
    generator.answer = lambda text: text
    assert generate().tolist() == plain(target, GREEDY)


def test_what_needs_more_than_a_text_is_refused_before_any_work(target: PreTrainedModel) -> None:
    model = attach(copy.deepcopy(target))
    generator = MTPCandidateGenerator.__new__(MTPCandidateGenerator)
    with pytest.raises(ValueError, match=r"MTPCandidateGenerator reads outputs of Transformers' own forwards"):
        model.generate(PROMPT, **GREEDY, assistant_model=generator, policy="auto")
    with pytest.raises(ValueError, match=r"drafts for one text, as in Transformers, and the call has 2"):
        model.generate(PROMPT.repeat(2, 1), **GREEDY, assistant_model=Knows([0]), policy="auto")
