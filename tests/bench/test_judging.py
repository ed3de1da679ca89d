import pytest
import torch
from transformers import PreTrainedModel

from tests.bench.conversations import Ticking
from transformers_resps import attach
from transformers_resps.bench.judging import Judge
from transformers_resps.bench.methods import Method, plain, prompt_lookup
from transformers_resps.bench.prompts import Prompt
from transformers_resps.bench.runs import Bench


PROMPT = Prompt("a/0", torch.tensor([1, 9, 8, 7]))


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 6, Ticking())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_answer_is_reported(bench: Bench, temperature: float) -> None:
    one = bench.decode(PROMPT, plain(), 0, temperature)
    other = Method("tree", {"suppress_tokens": one.token_ids[2:3].tolist()})
    judge = Judge(bench.model, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other, 0, temperature)])
    assert judge.same_text == {"plain": 1, "tree": 0}
    assert len(judge.unexplained) == 1 and judge.unexplained[0].startswith("tree, a/0, turn 1")


def test_a_sampled_text_of_a_stock_assistant_may_differ(bench: Bench) -> None:
    one = bench.decode(PROMPT, plain(), 0, 1.0)
    lookup = prompt_lookup()
    other = Method(lookup.name, {"suppress_tokens": one.token_ids[2:3].tolist()}, seed_exact=lookup.seed_exact)
    judge = Judge(bench.model, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other, 0, 1.0)])
    assert judge.same_text["prompt lookup"] == 0 and not judge.unexplained
