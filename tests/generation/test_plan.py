"""Which way each call is decoded, as a table of plans: nothing of it is run."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.lossless.test_encoder_decoders import inputs_of, target_of
from tests.multimodal_targets import target_named
from tests.recurrent_targets import NEEDS_STATES, recurrent
from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.generation import mixin
from transformers_resps.generation.plan import Plan
from transformers_resps.verifying.invariant import calls


ONE, TWO = torch.tensor([[3, 4, 5, 3, 4]]), torch.tensor([[3, 4, 5, 3, 4], [4, 5, 6, 3, 4]])
STATIC: dict[str, Any] = {"cache_implementation": "static"}
OPTIONS: dict[str, Any] = {"compile_config": CompileConfig(mode="default")}
LOOKUP = FixedPolicy(TreeShape(1, 0, 1, lookup=4))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """The plan of a call."""

    def of(target: Any = None, **call: Any) -> Plan:
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        plan: Plan = (target or llama()).generate(**settings | call)
        return plan

    monkeypatch.setattr(mixin, "decode", lambda plan, state: [plan])
    monkeypatch.setattr(mixin, "output", lambda prepared, plan: plan)
    return of


@cache
def llama() -> Any:
    return attach(Architecture("llama", {"num_hidden_layers": 2, "eos_token_id": 2}).build("sdpa"))


@cache
def head(layer: int) -> DraftHead:
    return DraftHead.from_target(llama(), feature_layers=[layer])


def drafted(ids: torch.Tensor = ONE, layer: int = 1, **call: Any) -> dict[str, Any]:
    return {"input_ids": ids, "assistant_model": head(layer)} | call


def looked_up(target: Any = None, ids: Any = ONE, **call: Any) -> dict[str, Any]:
    return {"target": target, "input_ids": ids, "policy": LOOKUP} | call


def alike(change: Callable[[Any], Any] | None = None) -> Any:
    """Another such target, changed."""
    target = copy.deepcopy(llama())
    if change is not None:
        change(target)
    return target


def with_code(target: Any) -> None:
    target.speculation_state.slot_engine.is_stored = lambda *target, **rows: True


def seeing() -> Any:
    return attach(target_named("qwen2_vl").build())


def remembering(**call: Any) -> dict[str, Any]:
    return looked_up(attach(recurrent("qwen3_5_text")[0].build()), **call)


def translating(model_type: str, **call: Any) -> dict[str, Any]:
    return {"target": target_of(model_type), "policy": LOOKUP} | inputs_of(model_type, 2) | call


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "a head": lambda: drafted(),
    "lookup": lambda: looked_up(),
    "two heads": lambda: drafted(assistant_model=[head(1), head(0)]),
    "embeddings": lambda: drafted(inputs_embeds=torch.ones(1, 5, 32).double()),
    "two rows": lambda: drafted(TWO),
    "sampled": lambda: drafted(TWO, do_sample=True),
    "sampled, ragged": lambda: drafted(TWO, do_sample=True, lockstep=False),
    "lockstep": lambda: drafted(TWO, lockstep=True),
    "scores": lambda: drafted(TWO, output_scores=True, return_dict_in_generate=True),
    "static": lambda: drafted(**STATIC),
    "static, last layer": lambda: drafted(layer=2, **STATIC),
    "compile": lambda: drafted(compile=True),
    "compile, two rows": lambda: drafted(TWO, compile=True),
    "compile, last layer": lambda: drafted(layer=2, compile=True),
    "compile, training": lambda: looked_up(alike(lambda target: target.train()), compile=True),
    "auto": lambda: looked_up(alike(), compile="auto"),
    "auto, code": lambda: looked_up(alike(with_code), compile="auto"),
    "compile_config": lambda: drafted(**OPTIONS),
    "compile=False": lambda: drafted(compile=False, **OPTIONS),
    "disable_compile": lambda: drafted(disable_compile=True, **OPTIONS),
    "compiled by hand": lambda: looked_up(alike(lambda target: target.compile()), compile=True),
    "invariant": lambda: drafted(invariant=True),
    "invariant alone": lambda: {"input_ids": TWO, "invariant": True},
    "invariant, compile": lambda: drafted(invariant=True, compile=True),
    "an image": lambda: looked_up(seeing(), None, **target_named("qwen2_vl").prompt("I")),
    "no image": lambda: looked_up(seeing()),
    "recurrent": lambda: remembering(),
    "recurrent, compile": lambda: remembering(compile=True),
    "t5": lambda: translating("t5"),
    "t5gemma": lambda: translating("t5gemma"),
    "t5gemma, compile": lambda: translating("t5gemma", compile=True),
}
PLANS = """
call                | verifier         | prompt           | rows        | sources | compiled, or why not
a head              | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
lookup              | growing cache    | the verifier     | in lockstep | 0 | nothing asks for it
two heads           | growing cache    | the verifier     | in lockstep | 2 | nothing asks for it
embeddings          | growing cache    | stock `generate` | in lockstep | 1 | nothing asks for it
two rows            | growing cache    | the verifier     | apart       | 1 | nothing asks for it
sampled             | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
sampled, ragged     | growing cache    | the verifier     | apart       | 1 | nothing asks for it
lockstep            | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
scores              | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
static              | slots            | the verifier     | in lockstep | 1 | nothing asks for it
static, last layer  | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
compile             | slots            | the verifier     | in lockstep | 1 | compiled
compile, two rows   | slots            | the verifier     | apart       | 1 | compiled
compile, last layer | growing cache    | the verifier     | in lockstep | 1 | the head reads the last layer's output
compile, training   | growing cache    | the verifier     | in lockstep | 0 | the model is in training mode
auto                | growing cache    | the verifier     | in lockstep | 0 | no code lies ready
auto, code          | slots            | the verifier     | in lockstep | 0 | compiled
compile_config      | slots            | the verifier     | in lockstep | 1 | compiled
compile=False       | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
disable_compile     | growing cache    | the verifier     | in lockstep | 1 | nothing asks for it
compiled by hand    | slots            | the verifier     | in lockstep | 0 | the caller compiled the model
invariant           | invariant slots  | the verifier     | in lockstep | 1 | nothing asks for it
invariant alone     | invariant slots  | the verifier     | apart       | 0 | nothing asks for it
invariant, compile  | invariant slots  | the verifier     | in lockstep | 1 | compiled
an image            | growing cache    | stock `generate` | in lockstep | 0 | nothing asks for it
no image            | growing cache    | stock `generate` | in lockstep | 0 | nothing asks for it
recurrent           | growing cache    | the verifier     | in lockstep | 0 | nothing asks for it
recurrent, compile  | slots            | the verifier     | in lockstep | 0 | compiled
t5                  | growing cache    | stock `generate` | in lockstep | 0 | nothing asks for it
t5gemma             | growing cache    | stock `generate` | apart       | 0 | nothing asks for it
t5gemma, compile    | growing cache    | stock `generate` | apart       | 0 | the model is an encoder-decoder
"""
ROWS = [[" ".join(part.split()) for part in line.split("|", maxsplit=1)] for line in PLANS.splitlines()[2:]]


def test_the_table_has_every_call() -> None:
    assert [name for name, _ in ROWS] == list(CALLS)


@pytest.mark.parametrize(
    ("name", "expected"), [pytest.param(*row, marks=NEEDS_STATES if "recurrent" in row[0] else ()) for row in ROWS]
)
def test_each_call_goes_its_way(
    name: str, expected: str, planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "keeps_rows_apart", lambda dtype: True)  # on any processor, in any dtype
    assert str(planned(**CALLS[name]())).startswith(expected)


@pytest.mark.parametrize("asked", [True, "auto"])
def test_only_who_asks_for_certain_is_warned(asked: Any, planned: Callable[..., Plan]) -> None:
    target = alike(lambda target: target.train())
    assert planned(**looked_up(target, compile=asked)).warns is (asked is True)
