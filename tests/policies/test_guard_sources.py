"""A source that is never right costs at most 3% of plain decoding, whatever its passes cost."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import FakeClock
from tests.policies.machine import MACHINES, Machine
from tests.pretend.pair import mtp, pair
from transformers_resps.assistants.causal import CausalDrafter
from transformers_resps.assistants.mtp import BoundMtp
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.drafting import StepModel
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Observation
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tree import DraftTree, TreeShape
from transformers_resps.verifying.growing import TreeVerifier


# Seconds of a draft beside its levels, and of each level, in plain steps
PRICES = {
    "an MTP layer": (0.1, 0.2),
    "an MTP layer whose draft vocabulary is small": (0.1, 0.03),
    "a small model": (0.0, 0.4),
    "a small model that is hardly smaller": (0.0, 0.9),
    "a Gemma assistant": (0.02, 0.06),
}
TOKENS = 512


@pytest.mark.parametrize("price", PRICES.values(), ids=PRICES)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("claimed", [0.02, 0.9])
def test_a_useless_source_of_any_price_costs_at_most_three_percent(
    price: tuple[float, float], machine: str, claimed: float
) -> None:
    """In its first call and in a later one."""
    verify, _ = MACHINES[machine]
    start, level = (share * verify(1) for share in price)
    fake, policy = Machine(verify, level, 0.001, claimed=claimed, start_seconds=start), default_policy()
    for _ in range(2):
        assert fake.write(policy, TOKENS) >= 0.97
    assert any(shape.asks_head for shape in fake.shapes), "it was never tried"


@pytest.fixture(scope="module")
def target() -> Any:
    return pair()[0]


def wrong_mtp(target: Any) -> Any:
    """A layer that is sure of what comes a token later."""
    module = mtp(target)
    module.layers[0].eh_proj.weight.copy_(module.layers[0].eh_proj.weight.roll(1, 0))
    return module


def wrong_model(target: Any) -> Any:
    """A copy of the target that is as sure of other tokens."""
    small = copy.deepcopy(target)
    small.lm_head.weight.copy_(small.lm_head.weight.roll(1, 0))
    return small


class SourceAlone(ThroughputPolicy):
    """As "auto", without the lookup that would earn what the source loses: the text repeats itself."""

    uses_lookup = False

    def choose(self, observation: Observation) -> TreeShape:
        return super().choose(replace(observation, prefix_accept_probs=list))


# What drafts, and the plain steps of its passes: of each one, and of each token that one reads or drafts
USELESS: dict[str, Any] = {
    "an MTP layer": (wrong_mtp, BoundMtp, 0.2, 0.001),
    "a small model": (wrong_model, CausalDrafter, 0.4, 0.03),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_source_costs_at_most_three_percent_of_a_call_that_it_reads_along(
    name: str, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass over tokens has its price, those included that read what plain steps have written."""
    make, kind, of_pass, of_token = USELESS[name]
    source, clock = make(target), FakeClock()
    model = kind if issubclass(kind, StepModel) else type(kind(source, target).bind(target))
    run, verify = model.run, TreeVerifier.verify
    passes: list[int] = []  # tokens

    def slow_run(self: Any, depth: int, tokens: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        passes.append(tokens.shape[1])
        clock.advance(of_pass + of_token * tokens.shape[1])
        return run(self, depth, tokens, *others, **more)

    def slow_verify(self: TreeVerifier, tree: DraftTree) -> Any:
        clock.advance(1.0 + 0.05 * (tree.node_count - 1))
        return verify(self, tree)

    monkeypatch.setattr(model, "run", slow_run)
    monkeypatch.setattr(TreeVerifier, "verify", slow_verify)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    prompt = torch.arange(3, 20)[None]
    options = {"policy": BaselineGuard(SourceAlone()), "max_new_tokens": TOKENS, "do_sample": False}
    out = target.generate(prompt, assistant_model=source, **options, return_dict_in_generate=True)
    steps = out.speculation.steps
    assert passes, "it was never tried"
    assert sum(step.accepted_total for step in steps) < 0.02 * TOKENS
    assert (TOKENS - 1) / sum(step.step_seconds for step in steps) >= 0.97
