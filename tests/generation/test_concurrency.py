"""One model, many callers, and callers that go away: every text is right and nothing stays behind in the model."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.policies.auto import default_policy
from transformers_resps.verifying.forward import FeatureTap


WIDE = TreeShape(40, 3, VOCABULARY)
CALLERS = 4


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa"))


@pytest.fixture(scope="module")
def heads(target: PreTrainedModel) -> list[DraftHead]:
    """Two heads that read different layers: neither may see what was caught for the other."""
    torch.manual_seed(1)
    return [DraftHead.from_target(target, feature_layers=layers) for layers in ([0, 2, 4], [1, 3])]


def prompt_of(caller: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 5 + caller), generator=torch.Generator().manual_seed(caller))


@pytest.fixture(scope="module")
def expected(target: PreTrainedModel) -> list[list[int]]:
    """The plain text of every caller."""
    return [target.generate(prompt_of(caller), max_new_tokens=16)[0].tolist() for caller in range(CALLERS)]


def hook_count(target: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())


@pytest.mark.parametrize("make_policy", [lambda: FixedPolicy(WIDE), default_policy], ids=["fixed", "auto"])
@pytest.mark.parametrize("shared", [True, False], ids=["one policy", "a policy each"])
def test_threads_with_different_heads_get_the_plain_texts(
    target: PreTrainedModel,
    heads: list[DraftHead],
    expected: list[list[int]],
    make_policy: Callable[[], Policy],
    shared: bool,
) -> None:
    common = make_policy()
    together = threading.Barrier(CALLERS)

    def run(caller: int) -> list[list[int]]:
        together.wait(timeout=300)
        extra: list[dict[str, Any]] = [
            {},
            {"assistant_model": heads[caller % 2], "policy": common if shared else make_policy()},
        ]
        return [
            target.generate(prompt_of(caller), max_new_tokens=16, **extra[(caller + turn) % 3 > 0])[0].tolist()
            for turn in range(3)
        ]

    with ThreadPoolExecutor(CALLERS) as pool:
        found = list(pool.map(run, range(CALLERS)))
    assert found == [[text] * 3 for text in expected]
    assert hook_count(target) == 0


def test_a_hook_that_another_thread_removes_meanwhile_is_harmless(
    target: PreTrainedModel, heads: list[DraftHead], expected: list[list[int]]
) -> None:
    """torch looks up whether a hook takes keywords when it calls it: by then the other thread's handle may be gone."""
    layers = heads[0].config.feature_layers or []
    with FeatureTap(target, layers):
        for layer in target.model.layers:
            layer._forward_pre_hooks_with_kwargs.clear()
        assert target.generate(prompt_of(0), max_new_tokens=16)[0].tolist() == expected[0]


def test_an_asyncio_server_answers_many_at_once(
    target: PreTrainedModel, heads: list[DraftHead], expected: list[list[int]]
) -> None:
    """`asyncio.to_thread` copies the caller's context: a request that leaked from it would show here."""

    def answer(caller: int) -> list[int]:
        options = {"assistant_model": heads[0], "policy": "auto"} if caller % 2 else {"policy": "auto"}
        return list(target.generate(prompt_of(caller), max_new_tokens=16, **options)[0].tolist())

    async def serve() -> list[list[int]]:
        return list(await asyncio.gather(*(asyncio.to_thread(answer, caller) for caller in range(CALLERS))))

    assert asyncio.run(serve()) == expected


# --- callers that go away ------------------------------------------------------------------------------------------


class GoesAway(BaseStreamer, LogitsProcessor, StoppingCriteria):
    """Raises at the n-th use, whatever it is used as."""

    def __init__(self, error: BaseException, uses: int) -> None:
        self.error, self.uses = error, uses

    def _use(self) -> None:
        self.uses -= 1
        if self.uses == 0:
            raise self.error

    def put(self, value: Any) -> None:
        self._use()

    def end(self) -> None:
        return None


class Processor(GoesAway):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._use()
        return scores


class Criterion(GoesAway):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._use()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FailingPolicy(GoesAway, Policy):
    def choose(self, observation: Any) -> TreeShape:
        self._use()
        return WIDE

    def observe(self, record: Any) -> None:
        self._use()


PARTS: dict[str, Callable[[BaseException], dict[str, Any]]] = {
    "streamer": lambda error: {"streamer": GoesAway(error, 5)},
    "processor": lambda error: {"logits_processor": LogitsProcessorList([Processor(error, 6)])},
    "criterion": lambda error: {"stopping_criteria": StoppingCriteriaList([Criterion(error, 6)])},
    "policy": lambda error: {"policy": FailingPolicy(error, 5)},
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("gone"), MemoryError()], ids=repr)
@pytest.mark.parametrize("part", [*PARTS, "target", "head"])
def test_an_interrupted_call_leaves_nothing_behind(
    target: PreTrainedModel, heads: list[DraftHead], expected: list[list[int]], part: str, error: BaseException
) -> None:
    """Ctrl-C or an error, in any part of a call: also in the middle of a forward of the target or the head."""
    call: dict[str, Any] = {"assistant_model": heads[0], "policy": FixedPolicy(WIDE), "max_new_tokens": 16}
    if part in PARTS:
        call |= PARTS[part](error)
    count = 0

    def interrupt(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise error

    module = {"target": target.model.layers[1], "head": heads[0].layers[0]}.get(part, torch.nn.Identity())
    handle = module.register_forward_hook(interrupt)
    with pytest.raises(type(error)):
        target.generate(prompt_of(0), **call)
    handle.remove()
    assert hook_count(target) == 0
    for extra in ({}, {"assistant_model": heads[1], "policy": FixedPolicy(WIDE)}):
        assert target.generate(prompt_of(1), max_new_tokens=16, **extra)[0].tolist() == expected[1]


class Cancelled(StoppingCriteria):
    """Stops when somebody else says so."""

    def __init__(self, after: int) -> None:
        self.after, self.event = after, threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= self.after:
            self.event.set()
        return torch.full((len(input_ids),), self.event.is_set())


@pytest.mark.parametrize("after", (8, 9, 11, 14))
def test_a_call_can_be_cancelled_at_any_token(
    target: PreTrainedModel, heads: list[DraftHead], expected: list[list[int]], after: int
) -> None:
    criteria = StoppingCriteriaList([Cancelled(after)])
    out = target.generate(
        prompt_of(1), assistant_model=heads[0], policy=FixedPolicy(WIDE), stopping_criteria=criteria, max_new_tokens=16
    )
    assert out[0].tolist() == expected[1][:after]
