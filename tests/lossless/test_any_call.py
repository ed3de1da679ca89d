"""Any call of `generate`, with any policy: the same call without a head is the oracle."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tests.compilation.as_it_is import compiled_as_it_is
from tests.lossless.answering import Restive
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, Policy, TreeShape, attach


@cache
def target_and_head(model_type: str) -> tuple[PreTrainedModel, DraftHead]:
    """In fp64, so that rounding can hide nothing; its vocabulary so small that wide trees are right."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    window = {"sliding_window": 5} if model_type == "mistral" else {}
    target = Architecture(model_type, sizes | window).build("sdpa")
    torch.manual_seed(1)
    return attach(target), DraftHead.from_target(target, feature_layers=[0, 1])


class Restless(Policy):
    """Another shape at every step, other answers to every question."""

    needs_head = False

    def __init__(self, shapes: list[TreeShape], grows: list[bool], sizes: list[int]) -> None:
        self.shapes, self.grows, self.sizes = shapes, grows, sizes
        self.asked = 0

    def _next(self, answers: list[Any]) -> Any:
        self.asked += 1
        return answers[self.asked % len(answers)]

    def choose(self, observation: Any) -> TreeShape:
        return self._next(self.shapes)

    def grow(self, level: Any) -> bool:
        return self._next(self.grows)

    def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int | list[int]:
        each = [self._next(self.sizes) for _ in scores]
        return each if self.asked % 3 else each[0]


class StopAt(StoppingCriteria):
    """Stops every row after a token of its own."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return input_ids[:, -1] == self.tokens[: len(input_ids)]


TOKENS = st.integers(3, VOCABULARY - 1)
SHAPES = st.builds(TreeShape, st.integers(1, 24), st.integers(0, 4), st.integers(1, VOCABULARY), st.integers(0, 5))
SWITCHES = st.tuples(st.booleans(), st.booleans())
POLICIES = st.tuples(
    st.lists(SHAPES, min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=3),
    st.lists(st.integers(-1, 24), min_size=1, max_size=4),
)
PROCESSORS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3),
    "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=4),
    "min_new_tokens": st.integers(1, 8),
    "sequence_bias": st.dictionaries(st.tuples(TOKENS), st.sampled_from([-3.0, 2.0]), min_size=1, max_size=3),
}
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.5, 1.5]),
    "top_k": st.integers(1, VOCABULARY),
    "top_p": st.sampled_from([0.3, 0.9]),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.5, 0.9]),
}


@dataclass
class Question:
    """A call of `generate`; `options` makes its stateful parts anew."""

    inputs: dict[str, torch.Tensor]
    plain_options: dict[str, Any]
    every: int
    stop_tokens: list[int]

    def options(self) -> dict[str, Any]:
        made = dict(self.plain_options)
        if self.every:
            made["logits_processor"] = LogitsProcessorList([Restive(self.every)])
        if self.stop_tokens:
            made["stopping_criteria"] = StoppingCriteriaList([StopAt(self.stop_tokens)])
        return made


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """One to three prompts, padded on the left, with any processors and any way to stop."""
    rows = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=3))
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    do_sample = draw(st.booleans())
    known = PROCESSORS | (SAMPLING if do_sample else {})
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True))
    options = {name: draw(known[name]) for name in chosen}
    ends = draw(st.lists(TOKENS, max_size=3, unique=True))
    options |= {"do_sample": do_sample, "max_new_tokens": draw(st.integers(1, 14)), "eos_token_id": ends or None}
    stop_tokens = draw(st.one_of(st.just([]), st.lists(TOKENS, min_size=3, max_size=3)))
    return Question(
        {"input_ids": ids, "attention_mask": mask}, options, draw(st.sampled_from([0, 0, 2, 3])), stop_tokens
    )


@settings(max_examples=160)
@given(questions(), POLICIES, st.sampled_from(["llama", "llama", "mistral"]), SWITCHES, st.integers(0, 99))
def test_any_call_with_any_policy_writes_what_plain_generate_writes(
    question: Question, policy: Any, model_type: str, switches: tuple[bool, bool], seed: int
) -> None:
    """With a head or not, compiled or not."""
    has_head, compiles = switches
    target, head = target_and_head(model_type)
    drafting = {"assistant_model": head if has_head else None, "policy": Restless(*policy), "compile": compiles}
    texts, states = [], []
    for extra in ({}, drafting):
        torch.manual_seed(seed)
        with compiled_as_it_is():
            texts.append(target.generate(**question.inputs, **question.options(), **extra).tolist())
        states.append(torch.get_rng_state())
    assert texts[0] == texts[1]
    assert torch.equal(*states), "drafting drew from the global generator"
