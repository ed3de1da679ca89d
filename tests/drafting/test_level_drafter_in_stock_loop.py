"""Transformers' own loop of assisted decoding runs with our generator, and verifies the best path of its pool."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from transformers_resps import DraftHead, TreeShape
from transformers_resps.drafting.level_drafter import ChainCandidates, LevelDrafter, best_path
from transformers_resps.heads import BoundHead
from transformers_resps.policies.base import Policy
from transformers_resps.tree import CandidatePool


SIZES = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
PROMPT = torch.tensor([[5, 7, 1, 3, 9, 7, 1]])

needs_model_outputs = pytest.mark.skipif(
    not hasattr(CandidateGenerator, "requires_model_outputs"),
    reason="older loops pass no outputs of the model to a candidate generator",
)


class WithOurGenerator(LlamaForCausalLM):  # type: ignore[misc]
    """Stock, except that its loop asks `ours` for candidates."""

    ours: CandidateGenerator

    def _get_candidate_generator(self, **options: Any) -> CandidateGenerator:
        return self.ours


class Counted(ChainCandidates):
    """Notes how many tokens of each chain were accepted, and that the loop tells so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accepted: list[int] = []

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        self.accepted.append(int(num_matches))


class Planted(LevelDrafter):
    """Its pools hold the next three tokens of a text, the last of them wrong, and worse ones beside them."""

    text: list[int]

    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        here = sum(pairs.tokens.shape[1] for pairs in self._unread) + 1
        right = [token % 11 for token in self.text[here : here + 3]] + [0] * 3
        tokens = torch.tensor([[(right[0] + 1) % 11, right[0], right[1], (right[2] + 1) % 11]])
        scores = torch.tensor([[0.2, 0.7, 0.6, 0.5]]).log()
        return CandidatePool(tokens, torch.tensor([[-1, -1, 1, 2]]), scores, torch.tensor([1, 1, 2, 3]))


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    torch.manual_seed(0)
    return (
        WithOurGenerator(LlamaConfig(**SIZES, initializer_range=0.6, eos_token_id=None, pad_token_id=0))
        .double()
        .eval()
    )


def assisted(target: Any, generator: CandidateGenerator, **options: Any) -> torch.Tensor:
    target.ours = generator
    return target.generate(PROMPT, prompt_lookup_num_tokens=1, do_sample=False, **options)


@needs_model_outputs
@pytest.mark.parametrize("layers", [1, 2])
def test_stocks_loop_writes_the_text_of_plain_generate(target: PreTrainedModel, layers: int) -> None:
    torch.manual_seed(3)
    head = DraftHead.from_target(target, num_hidden_layers=layers)
    generator = Counted(head, LevelDrafter(BoundHead(head, target), 1, None))
    plain = target.generate(PROMPT, max_new_tokens=48, do_sample=False)
    assert assisted(target, generator, max_new_tokens=48).tolist() == plain.tolist()
    assert sum(generator.accepted) > 0


@needs_model_outputs
def test_stocks_loop_accepts_what_the_best_path_has_right(target: PreTrainedModel) -> None:
    plain = target.generate(PROMPT, max_new_tokens=25, do_sample=False)
    head = DraftHead.from_target(target)
    drafter = Planted(head.bind(target), 1, None)
    drafter.text = plain[0].tolist()
    generator = Counted(head, drafter)
    assert assisted(target, generator, max_new_tokens=25).tolist() == plain.tolist()
    assert generator.accepted == [0] + [2] * 8


@needs_model_outputs
def test_the_head_reads_in_stocks_loop_what_it_reads_in_ours(target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target)
    drafter = LevelDrafter(head.bind(target), 1, None)
    text = assisted(target, ChainCandidates(head, drafter), max_new_tokens=20)
    drafter.read()
    states = target(text[:, : drafter._slots.length], output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in head.config.feature_layers or []], dim=-1)
    again = LevelDrafter(BoundHead(head, target), 1, None)
    again.observe(text[:, 1 : features.shape[1] + 1], features)
    again.read()
    torch.testing.assert_close(drafter._newest, again._newest)


@needs_model_outputs
def test_a_head_that_reads_the_last_layer_is_refused(target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target, feature_layers=[0, 2, 4])
    with pytest.raises(ValueError, match=r"reads hidden state 4.*attach"):
        assisted(target, ChainCandidates(head, LevelDrafter(head.bind(target), 1, None)), max_new_tokens=8)


def test_it_is_a_candidate_generator_of_transformers() -> None:
    assert issubclass(ChainCandidates, CandidateGenerator)


def test_the_best_path_is_the_one_with_the_most_expected_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parents = torch.tensor([[int(torch.randint(-1, node, (), generator=generator)) for node in range(12)]])
        scores = -torch.rand(1, 12, generator=generator)
        pool = CandidatePool(torch.arange(12)[None], parents, scores, torch.ones(12))
        paths = []
        for node in range(12):
            path = [node]
            while parents[0, path[0]] >= 0:
                path.insert(0, int(parents[0, path[0]]))
            paths.append(path)
        best = max(paths, key=lambda path: sum(scores[0, node].exp() for node in path))
        assert best_path(pool).tolist() == [best]
