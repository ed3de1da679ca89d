"""Static caches and compiled targets: the same tokens, few sizes, one compilation for each."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel, set_seed

from tests.conftest import FakeClock
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, DraftTree, FixedPolicy, Observation, Policy, TreeShape, attach
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.target.static_cache import Buckets, StaticWindowLayer


STATIC = {"cache_implementation": "static"}


class Cycle(Policy):
    """Some shapes, one after the other; keeps the features it is shown."""

    def __init__(self, *shapes: TreeShape) -> None:
        self.shapes = shapes
        self.features: list[torch.Tensor] = []

    def choose(self, observation: Observation) -> TreeShape:
        assert observation.features is not None
        self.features.append(observation.features.clone())
        return self.shapes[len(self.features) % len(self.shapes)]


WIDE = Cycle(TreeShape.plain(), TreeShape(40, 3, VOCABULARY), TreeShape(7, 2, 4), TreeShape(20, 4, 3, lookup=3))
_NAMES = ("llama", "mistral-window", "qwen2-mixed-windows", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss")
_CASES = [architecture for architecture in ARCHITECTURES if str(architecture) in _NAMES]


@pytest.mark.parametrize("architecture", _CASES, ids=str)
def test_a_static_cache_gives_the_tokens_of_plain_generate(architecture: Architecture) -> None:
    target = attach(architecture.build(architecture.attention[-1] if architecture.has_experts else "sdpa"))
    torch.manual_seed(1)
    head = DraftHead.from_target(target)
    prompts = torch.randint(1, VOCABULARY, (2, 11))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    accepted = 0
    for rows, do_sample, chunk in ((1, False, None), (1, True, 4), (2, True, None), (2, False, None)):
        options = {"attention_mask": mask[-rows:], "do_sample": do_sample, "max_new_tokens": 18}
        set_seed(3)
        expected = target.generate(prompts[-rows:] * mask[-rows:], **options)
        set_seed(3)
        options |= {"assistant_model": head, "policy": Cycle(*WIDE.shapes), "prefill_chunk_size": chunk, **STATIC}
        out = target.generate(prompts[-rows:] * mask[-rows:], **options, return_dict_in_generate=True)
        assert out.sequences.tolist() == expected.tolist()
        accepted += out.speculation.emitted - out.speculation.target_forwards * rows
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"num_hidden_layers": 2}).build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0, 1])


PROMPT = torch.tensor([[3, 4, 5, 3, 4]])


def speculate(target: PreTrainedModel, head: DraftHead | None, policy: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True} | options
    return target.generate(PROMPT, assistant_model=head, policy=policy, **options)


def test_lookups_alone_work_in_a_static_cache(target: PreTrainedModel) -> None:
    expected = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    out = speculate(target, None, FixedPolicy(TreeShape(1, 0, 1, lookup=6)), **STATIC)
    assert out.sequences.tolist() == expected.tolist()


def test_a_tree_larger_than_the_buffer_is_cut_to_what_fits(target: PreTrainedModel, head: DraftHead) -> None:
    expected = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    out = speculate(target, head, FixedPolicy(TreeShape(400, 3, VOCABULARY)), **STATIC)
    assert out.sequences.tolist() == expected.tolist()
    assert max(step.verified for step in out.speculation.steps) == 64


def test_the_buffers_keep_every_position_of_a_window() -> None:
    target = attach(Architecture("mistral", {"sliding_window": 8}).build("sdpa"))
    out = speculate(target, DraftHead.from_target(target), None, **STATIC)
    layers = getattr(out, "cache", out.past_key_values).layers
    assert all(type(layer) is StaticWindowLayer and layer.sliding_window == 8 for layer in layers)
    assert {int(layer.cumulative_length) for layer in layers} == {24}  # all but the newest token
    assert all(layer.keys.shape[2] > 24 for layer in layers)


def test_padding_is_seen_by_no_node_and_sees_none() -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 1]]))
    padded = Buckets(slots=99).padded(tree)
    assert padded.tokens.tolist() == [[5, 6, 7, 0]]
    assert padded.depths.tolist() == [[0, 1, 2, 0]]  # at the root's place: never behind the last position
    assert padded.ancestors.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]]
    assert Buckets(slots=None).padded(tree) is tree


@pytest.mark.parametrize(("filled", "kept"), [(0, 5), (2, 4), (5, 4), (6, 2), (8, 1)])
def test_a_tree_is_cut_to_the_largest_bucket_that_fits(filled: int, kept: int) -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]]))
    fitted = Buckets(slots=9).fitted(tree, filled)
    assert fitted.tokens.tolist() == [[5, 6, 7, 8, 9][:kept]]
    assert fitted.ancestors.shape == (1, kept, kept)


class CountingBackend:
    """Compiles nothing, but counts; tracing takes a hundred seconds of `clock`."""

    def __init__(self, clock: FakeClock) -> None:
        self.count, self.clock = 0, clock

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        self.clock.advance(100.0)
        return graph.forward

    def __deepcopy__(self, memo: Any) -> "CountingBackend":
        return self


@pytest.fixture
def backend(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingBackend]:
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", fake_clock)
    torch._dynamo.reset()
    yield CountingBackend(fake_clock)
    torch._dynamo.reset()


def test_a_bucket_is_compiled_once_and_its_seconds_are_no_steps(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend
) -> None:
    """Two calls, trees of 1, 3, 4 and 2 nodes: three buckets. The features are those that hooks catch."""
    shapes = (TreeShape.plain(), TreeShape(3, 2, 2), TreeShape(4, 1, 3), TreeShape(2, 1, 1))
    expected = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    plainly, compiled = Cycle(*shapes), Cycle(*shapes)
    speculate(target, head, plainly, **STATIC)
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    out = speculate(target, head, compiled, **STATIC, compile_config=config)
    assert out.sequences.tolist() == expected.tolist()
    assert backend.count == 3
    assert {step.verified for step in out.speculation.steps} >= {1, 2, 3, 4}
    assert all(step.step_seconds == 0.0 for step in out.speculation.steps)
    torch.testing.assert_close(torch.stack(compiled.features), torch.stack(plainly.features))
    again = speculate(target, head, Cycle(*shapes), **STATIC, compile_config=config, max_new_tokens=12)
    assert again.sequences.tolist() == expected[:, :17].tolist()
    assert backend.count == 3


def test_a_compilation_that_was_interrupted_is_no_steps_cost_in_the_next_call_either(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise KeyboardInterrupt

    shape = TreeShape(3, 2, 2)
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    with monkeypatch.context() as patch:
        patch.setattr(CountingBackend, "__call__", lambda self, graph, inputs: interrupt(graph, inputs))
        with pytest.raises(KeyboardInterrupt):
            speculate(target, head, FixedPolicy(shape), **STATIC, compile_config=config)
    out = speculate(target, head, FixedPolicy(shape), **STATIC, compile_config=config)
    assert backend.count and all(step.step_seconds == 0.0 for step in out.speculation.steps)


def test_a_target_that_the_caller_compiled_needs_a_static_cache(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks would be lost: plain decoding has compiled the forward before a head was there."""
    target(PROMPT, output_hidden_states=[0])  # Transformers' own hooks, which it adds at the first such call
    expected = target.generate(PROMPT, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(target, "forward", torch.compile(target.forward, backend=backend))
    policy = FixedPolicy(TreeShape(2, 1, 1))
    with pytest.raises(ValueError, match="a compiled target with a dynamic cache.*cache_implementation='static'"):
        speculate(target, head, policy)
    out = speculate(target, head, policy, **STATIC, max_new_tokens=8)
    assert out.sequences.tolist() == expected.tolist()
    assert backend.count == 1 + len({step.verified for step in out.speculation.steps[1:]})  # the prompt's too


def test_a_head_that_reads_behind_the_last_layer_is_refused_where_forwards_are_compiled(
    target: PreTrainedModel,
) -> None:
    deep = DraftHead.from_target(target, feature_layers=[0, 2])
    with pytest.raises(ValueError, match="reads hidden state 2.*after the final norm.*Leave out `compile_config`"):
        speculate(target, deep, None, **STATIC, compile_config=CompileConfig(backend="eager", mode=None))


def test_rows_of_a_static_cache_do_not_advance_apart(target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match="lockstep=False` does not work with a static cache"):
        target.generate(PROMPT.repeat(2, 1), assistant_model=head, lockstep=False, max_new_tokens=4, **STATIC)
