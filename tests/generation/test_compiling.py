"""Steps over slots, compiled or not: the same tokens, one compilation for all sizes, and eager after a fault."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedConfig, PreTrainedModel, set_seed

import transformers_resps
from tests.compilation.as_it_is import AsItIs
from tests.conftest import FakeClock
from tests.decoding.rows import AnyShape, prompts
from tests.kernels import deterministic_algorithms, needs_compiler
from tests.recurrent_targets import NEEDS_STATES, recurrent
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, Observation, Policy, TreeShape, attach, detach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.compilation import engine as compile_engine
from transformers_resps.compilation import packages
from transformers_resps.compilation.packages import ModulePackages, traced_files
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.drafting import engine as draft_engine
from transformers_resps.drafting.engine import DraftEngine
from transformers_resps.generation import request
from transformers_resps.verifying.invariant import attention as invariant
from transformers_resps.verifying.invariant import calls
from transformers_resps.verifying.invariant.row_classes import RowClasses, RowNeeds
from transformers_resps.verifying.returned import UnreadDynamicCache
from transformers_resps.verifying.slots import engine as slots
from transformers_resps.verifying.slots.engine import SlotEngine
from transformers_resps.verifying.slots.verifier import SlotVerifier


STATIC = {"cache_implementation": "static"}


class Cycle(Policy):
    """Some shapes, one after the other; keeps the features it is shown."""

    def __init__(self, *shapes: TreeShape) -> None:
        self.shapes = shapes
        self.features: list[torch.Tensor] = []

    def choose(self, observation: Observation) -> TreeShape:
        assert observation.features is not None
        self.features.append(observation.features.clone())
        self.least_lookup_prob = len(self.features) % 2 / 2
        return self.shapes[len(self.features) % len(self.shapes)]

    def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int | list[int]:
        """Rows differ in every other cycle."""
        if len(self.features) // len(self.shapes) % 2:
            return super().size(scores, levels)
        return [1 + scores.shape[1] // (1 + row) for row in range(len(scores))]


WIDE = Cycle(TreeShape.plain(), TreeShape(40, 3, VOCABULARY), TreeShape(7, 2, 4), TreeShape(20, 4, 3, lookup=3))
_NAMES = ("llama", "mistral-window", "qwen2-mixed-windows", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss")
_CASES = [architecture for architecture in ARCHITECTURES if str(architecture) in _NAMES]


@pytest.mark.parametrize("architecture", _CASES, ids=str)
def test_steps_over_slots_give_the_tokens_of_plain_generate(architecture: Architecture) -> None:
    target = attach(architecture.build(architecture.attention[-1] if architecture.has_experts else "sdpa"))
    torch.manual_seed(1)
    head = DraftHead.from_target(target)
    inputs = torch.randint(1, VOCABULARY, (3, 11))
    mask = torch.ones_like(inputs)
    mask[1, :4] = 0
    accepted = 0
    for rows, do_sample, chunk in ((1, False, None), (1, True, 4), (2, True, None), (3, False, None)):
        options = {"attention_mask": mask[-rows:], "do_sample": do_sample, "max_new_tokens": 18}
        set_seed(3)
        expected = target.generate(inputs[-rows:] * mask[-rows:], **options)
        set_seed(3)
        options |= {"assistant_model": head, "policy": Cycle(*WIDE.shapes), "prefill_chunk_size": chunk, **STATIC}
        out = target.generate(inputs[-rows:] * mask[-rows:], **options, return_dict_in_generate=True)
        assert out.sequences.tolist() == expected.tolist()
        accepted += out.speculation.emitted_total - out.speculation.target_forwards * rows
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def target() -> PreTrainedModel:
    """One layer: tracing takes longer than all else here."""
    return attach(Architecture("llama", {"num_hidden_layers": 1}).build("sdpa"))


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0])


PROMPT = torch.tensor([[3, 4, 5, 3, 4]])


def speculate(target: PreTrainedModel, head: DraftHead | None, policy: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True} | options
    return target.generate(PROMPT, assistant_model=head, policy=policy, **options)


def plainly(target: PreTrainedModel, count: int = 20) -> list[list[int]]:
    tokens: list[list[int]] = target.generate(PROMPT, max_new_tokens=count, do_sample=False).tolist()
    return tokens


def test_lookups_alone_work_over_slots(target: PreTrainedModel) -> None:
    out = speculate(target, None, FixedPolicy(TreeShape(1, 0, 1, lookup=6)), **STATIC)
    assert out.sequences.tolist() == plainly(target)


def test_a_text_that_outgrows_its_buffers_moves_to_larger_ones(target: PreTrainedModel, head: DraftHead) -> None:
    out = speculate(target, head, FixedPolicy(TreeShape(60, 3, VOCABULARY)), **STATIC, max_new_tokens=200)
    assert out.sequences.tolist() == plainly(target, 200)


def test_a_call_goes_on_from_the_cache_of_one_over_slots() -> None:
    """Full layers and windows: what comes back is a stock cache with all but the newest token."""
    target = attach(Architecture("mistral", {"sliding_window": 8}).build("sdpa"))
    head = DraftHead.from_target(target)
    first = speculate(target, head, WIDE, **STATIC)
    cache = first[CACHE_KEYWORD]
    assert {layer.get_seq_length() for layer in cache.layers} == {24}
    options = {
        CACHE_KEYWORD: cache,
        "attention_mask": torch.ones_like(first.sequences),
        "assistant_model": head,
        "policy": WIDE,
        "max_new_tokens": 10,
        "do_sample": False,
    }
    again = target.generate(first.sequences, **options)
    assert again.tolist() == plainly(target, 30)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_cache_is_filled_when_someone_looks_at_it_or_another_call_begins(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "CompiledFunction", AsItIs)
    target, filled, give_back = attach(Architecture(architecture).build("sdpa")), list[int](), SlotVerifier._give_back

    def counted(self: SlotVerifier, *given: Any) -> None:
        filled.append(given[-1])
        give_back(self, *given)

    monkeypatch.setattr(SlotVerifier, "_give_back", counted)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 20}
    plain = target.generate(PROMPT, **options)
    looked_at, overtaken = (speculate(target, None, "auto", compile=True) for _ in range(2))
    assert filled == [24]  # the second call needed the place of the first one's entries
    other = torch.randint(1, VOCABULARY, (1, 30))
    with torch.inference_mode():
        target.generate(other, policy="auto", compile=True, max_new_tokens=8, return_dict_in_generate=True)
    assert filled == [24, 24] and not overtaken[CACHE_KEYWORD].layers[0].keys.is_inference()
    target.generate(other, policy="auto", compile=True, max_new_tokens=8, return_dict_in_generate=True)
    assert filled == [24, 24]  # that of the call before was dropped
    for out in (looked_at, overtaken):
        for ours, theirs in zip(out[CACHE_KEYWORD].layers, plain[CACHE_KEYWORD].layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    assert filled == [24, 24]


def test_a_look_at_a_cache_of_another_thread_waits_until_it_is_filled(target: PreTrainedModel) -> None:
    begun, may_end, looked = threading.Event(), threading.Event(), list[int]()

    def make() -> DynamicCache:
        begun.set()
        may_end.wait(300)
        looked.append(0)
        return DynamicCache(config=target.config)

    cache = UnreadDynamicCache(make)
    threads = [threading.Thread(target=lambda: len(cache.layers)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(300)
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join(300)
    assert looked == [0]


@dataclass(frozen=True)
class Untraced:
    """Stands for a graph."""

    forward: Callable[..., Any]


class CountingBackend:
    """Compiles nothing, but counts; compiling takes a hundred seconds of `clock`. `fault` is what compiling raises."""

    def __init__(self, clock: FakeClock) -> None:
        self.count, self.clock = 0, clock
        self.fault: BaseException | None = None
        self.change: Callable[[Any], Any] | None = None  # of what compiled code returns

    def __call__(self, graph: torch.fx.GraphModule | Untraced, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        if self.fault is not None:
            raise self.fault
        self.count += 1
        self.clock.advance(100.0)
        change = self.change
        return graph.forward if change is None else lambda *args: change(graph.forward(*args))


def is_of_draft(function: Callable[..., Any]) -> bool:
    """Whether it is a part of a draft: tests/drafting/test_engine_levels.py compiles it."""
    return function.__name__ == "draft_pass"


@pytest.fixture
def backend(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingBackend]:
    """What `compile=True` compiles the target with; drafts run as they are."""
    for timed in (TreeDecoding, SlotEngine, DraftEngine):
        monkeypatch.setitem(timed.__init__.__kwdefaults__, "clock", fake_clock)
    found, stock = CountingBackend(fake_clock), torch.compile

    def compile_target(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if is_of_draft(function):
            return function
        return stock(function, backend=found, **options)

    monkeypatch.setattr(compiled_function.torch, "compile", compile_target)
    monkeypatch.setattr(compile_engine, "compiler", lambda: "none is called")
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.fixture
def untraced(backend: CountingBackend, monkeypatch: pytest.MonkeyPatch) -> CountingBackend:
    """The same, but each function goes to the backend as it is: tracing takes seconds."""

    def compile_untraced(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        if is_of_draft(function):
            return function
        compiled: list[Callable[..., Any]] = []

        def call(*inputs: torch.Tensor) -> Any:
            if not compiled:
                compiled.append(backend(Untraced(function), [*inputs]))
            return compiled[0](*inputs)

        return call

    monkeypatch.setattr(compiled_function.torch, "compile", compile_untraced)
    return backend


def test_a_cache_that_no_one_reads_is_not_filled(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    monkeypatch.setattr(SlotVerifier, "_give_back", lambda *given: filled.append(given[-1]))
    out = speculate(target, head, WIDE, **STATIC, return_dict_in_generate=False)
    assert out.tolist() == plainly(target) and not filled
    speculate(target, head, WIDE, **STATIC)
    cache = DynamicCache(config=target.config)
    speculate(target, head, WIDE, compile=True, return_dict_in_generate=False, **{CACHE_KEYWORD: cache})
    assert filled == [24, 24]


SHAPES = (TreeShape.plain(), TreeShape(3, 2, 2), TreeShape(40, 3, 5), TreeShape(2, 1, 1))


def test_all_sizes_are_compiled_once_and_its_seconds_are_no_steps(backend: CountingBackend) -> None:
    """Three calls, trees of many sizes, texts of several buffers. The features are those that hooks catch."""
    target = attach(Architecture("llama", {"num_hidden_layers": 2}).build("sdpa"))
    torch.manual_seed(1)
    head = DraftHead.from_target(target, feature_layers=[0, 1])
    eager, compiled = Cycle(*SHAPES), Cycle(*SHAPES)
    speculate(target, head, eager)
    out = speculate(target, head, compiled, compile=True)
    assert out.sequences.tolist() == plainly(target)
    assert backend.count == 1
    assert len({step.verified for step in out.speculation.steps}) > 2
    assert all(step.step_seconds == 0.0 for step in out.speculation.steps)
    torch.testing.assert_close(torch.stack(compiled.features), torch.stack(eager.features))
    for count in (12, 200):
        again = speculate(target, head, Cycle(*SHAPES), compile=True, max_new_tokens=count)
        assert again.sequences.tolist() == plainly(target, count)
    assert backend.count == 1


def test_a_model_of_a_new_class_does_not_make_the_next_call_compile(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend
) -> None:
    """Transformers keeps a table of classes, which every forward reads: a step would compile, and without freezing."""

    class NewModel(PreTrainedModel):
        pass

    speculate(target, head, WIDE, compile=True)
    NewModel(PreTrainedConfig())
    again = speculate(target, head, WIDE, compile=True)
    assert backend.count == 1 and again.sequences.tolist() == plainly(target)
    assert {step.step_seconds for step in again.speculation.steps} == {0.0}


def test_calls_in_and_out_of_inference_mode_are_compiled_apart_and_no_step_pays(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend, warnings_of: Any
) -> None:
    """What is kept from call to call was made in the other mode: outside, inference tensors cannot be written."""
    expected = plainly(target)
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            out = speculate(target, head, Cycle(*SHAPES), compile=True)
        assert out.sequences.tolist() == expected
        assert {step.step_seconds for step in out.speculation.steps} == {0.0}
    assert backend.count == 2
    assert [" again, " in line for line in warnings_of() if "Compiling the target" in line] == [False, True]


def test_batches_are_compiled_once_more_however_their_rows_end(
    target: PreTrainedModel, head: DraftHead, backend: CountingBackend
) -> None:
    for seed, do_sample in ((1, False), (2, True), (3, False)):
        inputs = prompts(seed, rows=2 + seed)
        options = {"do_sample": do_sample, "max_new_tokens": 30, "eos_token_id": [1, 2], "pad_token_id": 0}
        set_seed(seed)
        expected = target.generate(**inputs, **options)
        set_seed(seed)
        found = target.generate(**inputs, **options, assistant_model=head, policy=AnyShape(seed), compile=True)
        assert found.tolist() == expected.tolist()
    assert backend.count == 1


def test_a_compilation_that_was_interrupted_is_no_steps_cost_in_the_next_call_either(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    untraced.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        speculate(target, head, FixedPolicy(TreeShape(3, 2, 2)), compile=True)
    untraced.fault = None
    out = speculate(target, head, FixedPolicy(TreeShape(3, 2, 2)), compile=True)
    assert untraced.count == 1 and all(step.step_seconds == 0.0 for step in out.speculation.steps)


_FAULTS = [torch.OutOfMemoryError("no memory"), RuntimeError("no C++ compiler"), OSError("disk full")]


@pytest.mark.parametrize(
    ("compiler", "fault"),
    [("backend", _FAULTS[1]), *(("untraced", fault) for fault in _FAULTS)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(
    target: PreTrainedModel, head: DraftHead, compiler: str, fault: Exception, warnings_of: Any, request: Any
) -> None:
    request.getfixturevalue(compiler).fault = fault
    for _ in range(2):
        out = speculate(target, head, Cycle(*SHAPES), compile=True)
        assert out.sequences.tolist() == plainly(target)
    assert [line for line in warnings_of() if "runs without compilation" in line and str(fault) in line]
    assert len([line for line in warnings_of() if "runs without compilation" in line]) == 1


def test_a_bug_is_not_taken_for_what_cannot_be_compiled(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    untraced.fault = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        speculate(target, head, Cycle(*SHAPES), compile=True)


def test_compiled_code_that_gives_other_logits_is_not_used(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, warnings_of: Any
) -> None:
    untraced.change = lambda outputs: tuple(part * 1.01 for part in outputs)
    out = speculate(target, head, Cycle(*SHAPES), compile=True)
    assert out.sequences.tolist() == plainly(target)
    assert any("its logits differ from the eager ones" in line for line in warnings_of())


def test_a_fault_in_the_middle_of_a_text_repeats_the_step_as_it_is(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, warnings_of: Any
) -> None:
    runs = 0

    def fail_at_the_third(outputs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise torch.OutOfMemoryError("no memory")
        return outputs

    untraced.change = fail_at_the_third
    out = speculate(target, head, Cycle(*SHAPES), compile=True)
    assert out.sequences.tolist() == plainly(target)
    assert runs == 3 and any("no memory" in line for line in warnings_of())


def _load(target: PreTrainedModel) -> None:
    target.load_state_dict({name: value.flip(0) for name, value in target.state_dict().items()})


def _through_data(target: PreTrainedModel) -> None:
    target.model.layers[0].mlp.up_proj.weight.data.mul_(-2.0)


@pytest.mark.parametrize("change", [_load, _through_data, lambda target: target.float()], ids=["load", "data", "to"])
def test_weights_that_change_between_calls_are_compiled_anew(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, change: Callable[[Any], Any]
) -> None:
    before = speculate(target, head, Cycle(*SHAPES), compile=True).sequences.tolist()
    change(target)
    head.to(dtype=target.dtype)
    after = speculate(target, head, Cycle(*SHAPES), compile=True).sequences.tolist()
    assert after == plainly(target) and untraced.count == 2
    assert after != before or target.dtype is torch.float32


def test_weights_that_change_after_a_call_that_was_cut_are_compiled_anew(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    class Cut(Cycle):
        def choose(self, observation: Observation) -> TreeShape:
            if len(self.features) == 2:
                raise KeyboardInterrupt
            return super().choose(observation)

    with pytest.raises(KeyboardInterrupt):
        speculate(target, head, Cut(*SHAPES), compile=True)
    assert untraced.count == 1
    _through_data(target)
    out = speculate(target, head, Cycle(*SHAPES), compile=True)
    assert out.sequences.tolist() == plainly(target) and untraced.count == 2


def test_a_call_beside_another_runs_as_it_is(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    inner: list[Any] = []

    class Meanwhile(Cycle):
        def choose(self, observation: Observation) -> TreeShape:
            if not inner:
                thread = threading.Thread(
                    target=lambda: inner.append(speculate(target, head, Cycle(*SHAPES), compile=True))
                )
                thread.start()
                thread.join()
            return super().choose(observation)

    out = speculate(target, head, Meanwhile(*SHAPES), compile=True)
    assert out.sequences.tolist() == inner[0].sequences.tolist() == plainly(target)
    assert untraced.count == 1


class FakeCompiler:
    """Stands for a process beside: keeps what it was to compile."""

    is_running = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def start(self, identity: str, checkpoint: str, *arguments: str) -> None:
        self.asked.append((checkpoint, *arguments))


@pytest.fixture
def compiler(target: PreTrainedModel) -> FakeCompiler:
    target.speculation_state.compiler = fake = FakeCompiler()
    return fake


def test_auto_lets_another_process_compile_and_goes_on_as_it_is(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, compiler: FakeCompiler
) -> None:
    target.name_or_path = target.config.name_or_path = "a folder"
    head.name_or_path = head.config.name_or_path = "a head"
    out = speculate(target, head, Cycle(*SHAPES), compile="auto")
    assert untraced.count == 0 and out.sequences.tolist() == plainly(target)
    target.generate(**prompts(1, rows=2), policy="auto", compile="auto", max_new_tokens=5, pad_token_id=0)
    options = "--dtype", "float64", "--threads", str(torch.get_num_threads()), "--rows"
    assert compiler.asked == [("a folder", "a head", *options, "1"), ("a folder", *options, "2")]


def test_auto_takes_up_code_that_lies_ready_and_compiles_none_itself(
    target: PreTrainedModel,
    head: DraftHead,
    untraced: CountingBackend,
    compiler: FakeCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code for a batch is none for a row; what cannot be loaded after all runs as it is."""
    asked: list[str] = []
    monkeypatch.setattr(ModulePackages, "have", lambda _, code: asked.append(code) or "one row" in code)
    inputs = prompts(1, rows=2)
    target.generate(**inputs, assistant_model=head, policy=WIDE, compile="auto", max_new_tokens=5, pad_token_id=0)
    out = speculate(target, head, Cycle(*SHAPES), compile="auto")
    assert asked == ["packed steps, a batch", "steps, one row"]
    assert untraced.count == 0 and out.sequences.tolist() == plainly(target)
    assert len(compiler.asked) == 2, "the code lacks still"
    speculate(target, head, Cycle(*SHAPES), compile=True)
    out = speculate(target, head, Cycle(*SHAPES), compile="auto")
    assert untraced.count == 1 and out.sequences.tolist() == plainly(target)
    assert len(compiler.asked) == 2


@needs_compiler
def test_a_call_that_waits_keeps_its_code_where_auto_looks_for_it(
    target: PreTrainedModel, untraced: CountingBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While it compiles, the target attends by another name."""

    def refuse(*_: Any, **__: Any) -> None:
        raise packages.PackagingError("planted: nothing is compiled here")

    monkeypatch.setattr(packages, "_compile", refuse)
    monkeypatch.setenv(packages.FOLDER_VARIABLE, str(tmp_path))
    speculate(target, None, FixedPolicy(TreeShape.plain()), compile=True)
    assert untraced.count == 1
    assert target.speculation_state.slot_engine.identity(target) == SlotEngine().identity(target)


def test_what_auto_learns_beside_a_compiler_is_forgotten(
    target: PreTrainedModel, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Policy] = []
    make = request.default_policy
    monkeypatch.setattr(request, "default_policy", lambda: made.append(make()) or made[-1])
    counts = []
    for is_running in (False, True, True, False):
        compiler.is_running = is_running
        speculate(target, None, "auto", compile="auto")
        counts.append(len(made))
    assert counts == [1, 2, 2, 2]


def test_attach_and_compile_config_ask_for_it_too(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    speculate(target, head, Cycle(*SHAPES), compile_config=CompileConfig())
    assert untraced.count == 1
    speculate(target, head, Cycle(*SHAPES), compile_config=CompileConfig(), disable_compile=True)
    attach(target, assistant_model=head, policy=Cycle(*SHAPES), compile=True)
    assert target.generate(PROMPT, max_new_tokens=20, do_sample=False).tolist() == plainly(detach(target))
    assert untraced.count == 1


def test_a_copy_has_no_compiled_code(target: PreTrainedModel, head: DraftHead, backend: CountingBackend) -> None:
    speculate(target, head, Cycle(*SHAPES), compile=True)
    copied = copy.deepcopy(target)
    assert target.speculation_state.slot_engine.is_compiled and not copied.speculation_state.slot_engine.is_compiled
    out = speculate(copied, DraftHead.from_target(copied, feature_layers=[0]), Cycle(*SHAPES), compile=True)
    assert out.sequences.tolist() == plainly(target) and backend.count == 2


def test_without_a_compiler_nothing_is_traced_and_the_warning_says_what_to_install(
    target: PreTrainedModel,
    backend: CountingBackend,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(compile_engine, "compiler", lambda: None)
    for _ in range(2):
        out = speculate(target, None, FixedPolicy(TreeShape.plain()), compile=True)
        assert out.sequences.tolist() == plainly(target)
    assert backend.count == 0
    [warning] = warnings_of()
    told = "The target's forward runs without compilation: no C++ compiler is installed. Install one to compile (on"
    assert warning.startswith(told) and "apt install g++" in warning


def test_what_stands_against_compiling_is_said_and_the_text_is_right(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, warnings_of: Any
) -> None:
    deep = DraftHead.from_target(target, feature_layers=[0, 1])
    out = speculate(target, deep, FixedPolicy(SHAPES[1]), compile=True)
    assert out.sequences.tolist() == plainly(target)
    assert any("the head reads the last layer's output" in line for line in warnings_of())
    target.train()
    speculate(target, head, FixedPolicy(SHAPES[1]), compile=True)
    assert any("the model is in training mode" in line for line in warnings_of())
    assert untraced.count == 0


def test_an_adapter_must_be_merged_before_its_model_is_compiled(
    target: PreTrainedModel, untraced: CountingBackend, warnings_of: Any
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = attach(peft.get_peft_model(target, config)).eval()
    options = {"max_new_tokens": 12, "do_sample": False}
    policy = FixedPolicy(TreeShape(1, 0, 1, lookup=4))
    expected = adapted.generate(PROMPT, **options).tolist()
    assert adapted.generate(PROMPT, policy=policy, compile=True, **options).tolist() == expected
    assert any("an adapter is active; merge it first" in line for line in warnings_of())
    assert untraced.count == 0
    adapted.merge_adapter()
    assert adapted.generate(PROMPT, policy=policy, compile=True, **options).tolist() == expected
    assert untraced.count == 1
    adapted.unmerge_adapter()
    assert adapted.generate(PROMPT, policy=policy, compile=True, **options).tolist() == expected
    assert untraced.count == 1


def test_a_target_that_the_caller_compiled_is_run_as_it_is(target: PreTrainedModel, head: DraftHead) -> None:
    """Its features are outputs: hooks would be lost, since plain decoding has compiled the forward without them."""
    torch._dynamo.reset()
    target(PROMPT, output_hidden_states=[0])  # Transformers' own hooks, which it adds at the first such call
    expected = plainly(target)
    target.forward = torch.compile(target.forward, backend="eager", dynamic=True)
    assert plainly(target) == expected
    out = speculate(target, head, Cycle(*SHAPES))
    assert out.sequences.tolist() == expected
    deep = DraftHead.from_target(target, feature_layers=[0, 1])
    with pytest.raises(ValueError, match="reads hidden state 1.*after the final norm"):
        speculate(target, deep, FixedPolicy(SHAPES[1]))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"), [({"compile": "always"}, "'auto' or None"), ({"compile": True}, "policy='auto'")]
)
def test_a_wrong_or_useless_compile_is_refused(target: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, **options)


@needs_compiler
def test_inductor_compiles_target_and_levels_with_their_weights_inside_once(caplog: pytest.LogCaptureFixture) -> None:
    """The real compiler, on one layer: sizes and rows that were not there when it was compiled."""
    torch._dynamo.utils.counters.clear()
    target = attach(Architecture("llama", {"num_hidden_layers": 1}).build("sdpa").float())
    torch.manual_seed(1)
    head = DraftHead.from_target(target, feature_layers=[0])
    for shapes in ((TreeShape(6, 3, 2), TreeShape(40, 3, 5), TreeShape(3, 2, 2)), (TreeShape(9, 5, 3),)):
        out = speculate(target, head, Cycle(*shapes), compile=True, max_new_tokens=150)
        assert out.sequences.tolist() == plainly(target, 150)
    assert target.speculation_state.slot_engine.is_compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # and what fuses features
    told = [record.getMessage() for record in caplog.records if "transformers_resps" in record.name]
    assert sum("Compiling" in line for line in told) == len(told) == 2
    assert SlotEngine().is_compiled is False


@needs_compiler
@NEEDS_STATES
def test_inductor_compiles_a_target_with_recurrent_layers_once_for_trees_of_all_sizes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real compiler; drafts run as they are."""
    monkeypatch.setattr(draft_engine, "CompiledFunction", AsItIs)
    (architecture,) = recurrent("qwen3_5_text")
    sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    target = attach(replace(architecture, config=architecture.config | sizes).build())
    torch.manual_seed(1)
    head = DraftHead.from_target(target, feature_layers=[0])
    for policy in (FixedPolicy(TreeShape.plain()), FixedPolicy(TreeShape(6, 5, 1)), Cycle(*SHAPES)):
        out = speculate(target, head, policy, compile=True, max_new_tokens=60)
        assert out.sequences.tolist() == plainly(target, 60)
    assert target.speculation_state.slot_engine.is_compiled
    assert sum("Compiling the target" in record.getMessage() for record in caplog.records) == 1


INVARIANT = {"invariant": True, "compile": True}
PACKAGE = Path(transformers_resps.__file__).parent


class _OneByOne(nn.Linear):
    """In which no row knows another, as in kernels of ours."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (input[..., None, :] * self.weight).sum(dim=-1)


@pytest.fixture
def with_kernels_of_ours(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "keeps_rows_apart", lambda dtype: True)
    for part in target.modules():
        if type(part) is nn.Linear:
            part.__class__ = _OneByOne


@torch.library.custom_op("resps_tests::block_attention", mutates_args=())
def attention_of_each_node_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    nodes: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `bf16_block_attention`, in any precision."""
    rows, heads, count, _ = query.shape
    found = query.new_empty(rows, count, heads, value.shape[3])
    length = (mask.shape[2] - nodes[0].numel()) // count
    for row, node in product(range(rows), range(count)):
        shown = mask[row, 0] > -1e30
        read = [*shown[node * length : (node + 1) * length].flatten().nonzero().flatten().tolist()]
        for member in (nodes[row].flatten() == node).nonzero().flatten().tolist():
            read += slots[row, member // nodes.shape[2]][shown[count * length + member]].tolist()
        keys, values = (
            part[row, :, read or [0]].repeat_interleave(heads // part.shape[1], 0) for part in (key, value)
        )
        weights = (query[row, :, node, None] @ keys.mT * scale).softmax(-1)
        found[row, node] = (weights @ values)[:, 0]
    return found


@attention_of_each_node_alone.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@pytest.mark.usefixtures("with_kernels_of_ours")
@pytest.mark.parametrize("options", [{"compile": True}, INVARIANT], ids=["normal", "invariant"])
def test_the_key_of_a_package_holds_all_files_whose_code_is_compiled(
    target: PreTrainedModel, head: DraftHead, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled functions run as they are here, and each call inside them tells its file."""
    seen = set[str]()

    class Watched(AsItIs):
        def __call__(self, *args: Any) -> Any:
            sys.setprofile(lambda frame, *_: seen.add(frame.f_code.co_filename))
            try:
                return super().__call__(*args)
            finally:
                sys.setprofile(None)

    for engine in (slots, draft_engine):
        monkeypatch.setattr(engine, "CompiledFunction", Watched)
    speculate(target, head, FixedPolicy(TreeShape(6, 3, 2)), **options)
    own = {Path(file) for file in seen if Path(file).is_relative_to(PACKAGE)}
    assert {"forwards.py", "passes.py", "model.py"} <= {file.name for file in own}
    assert own <= set(traced_files())


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_the_invariant_mode_is_compiled_once_for_chains_and_trees_with_a_head_or_without(
    target: PreTrainedModel,
    head: DraftHead,
    backend: CountingBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A size that may be none or one would be compiled apart. Attention is planted, and knows no other node."""

    def attend(*given: Any) -> torch.Tensor:
        *read, sinks, scale = given
        return attention_of_each_node_alone(*read, scale)

    monkeypatch.setattr(invariant, "attends_natively", lambda *states: True)
    monkeypatch.setattr(invariant, "bf16_block_attention", attend)
    policies = [FixedPolicy(TreeShape.plain()), FixedPolicy(TreeShape(1, 0, 1, lookup=6)), "auto"]
    texts = [
        speculate(target, None, policy, **INVARIANT, max_new_tokens=150).sequences.tolist() for policy in policies
    ]
    assert backend.count == 1
    for shape in (TreeShape(4, 3, 1), TreeShape(6, 3, 2), TreeShape(40, 3, 5)):
        texts.append(speculate(target, head, FixedPolicy(shape), **INVARIANT, max_new_tokens=150).sequences.tolist())
        assert backend.count == 1
    assert texts == texts[:1] * 6
    assert sum("Compiling the target" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.usefixtures("with_kernels_of_ours")
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_compiled_code_of_the_invariant_mode_reads_the_prompts_of_a_batch(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend, chunk_size: int | None
) -> None:
    """Planted code adds 1 to all logits, which changes no token: those of the first one tell what has read."""
    prompts, mask = torch.tensor([[0, 0, 6, 7, 8], PROMPT[0].tolist()]), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    options = {"assistant_model": head, "policy": WIDE, "do_sample": False, "max_new_tokens": 12}
    options |= {"return_dict_in_generate": True, "output_logits": True, "prefill_chunk_size": chunk_size}
    rows = zip(prompts, mask.bool(), strict=True)
    alone = [target.generate(row[None, seen], **options, invariant=True) for row, seen in rows]
    untraced.change = lambda outputs: (outputs[0] + 1, *outputs[1:])
    found = target.generate(prompts, attention_mask=mask, **options, **INVARIANT)
    for row, expected in enumerate(alone):
        assert found.sequences[row, 5:].tolist() == expected.sequences[0, -12:].tolist()
        torch.testing.assert_close(found.logits[0][row], expected.logits[0][0] + 1)


@pytest.mark.usefixtures("with_kernels_of_ours")
@pytest.mark.parametrize("options", [{"compile": True}, INVARIANT], ids=["normal", "invariant"])
def test_code_of_the_invariant_mode_alone_rounds_after_each_operator(
    target: PreTrainedModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    class Asked(AsItIs):
        def __init__(self, *args: Any, is_invariant: bool, **options: Any) -> None:
            super().__init__(*args, **options)
            asked.append(is_invariant)

    monkeypatch.setattr(slots, "CompiledFunction", Asked)
    speculate(target, None, "auto", **options)
    assert set(asked) == {"invariant" in options}


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_code_of_the_invariant_mode_that_rounds_otherwise_than_earlier_code_is_refused(
    target: PreTrainedModel, head: DraftHead, untraced: CountingBackend
) -> None:
    """Until weights change: other code is made then."""
    speculate(target, None, FixedPolicy(TreeShape.plain()), **INVARIANT)
    untraced.change = lambda outputs: (outputs[0] * (1 + 1e-9), *outputs[1:])
    batch: dict[str, Any] = {**prompts(1, rows=2), **INVARIANT, "max_new_tokens": 5, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"rounds a text in several ways when it runs compiled:"):
        target.generate(**batch, assistant_model=head, policy=FixedPolicy(TreeShape(6, 3, 2)))
    with torch.no_grad():
        target.lm_head.weight.mul_(2)
    target.generate(**batch, assistant_model=head, policy=FixedPolicy(TreeShape(6, 3, 2)))


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_the_invariant_mode_never_runs_steps_as_they_are_where_compiled_ones_are_asked_for(
    target: PreTrainedModel, untraced: CountingBackend
) -> None:
    with target.speculation_state.slot_engine.borrow(target), pytest.raises(ValueError, match="Another call runs"):
        speculate(target, None, "auto", **INVARIANT)
    untraced.fault = RuntimeError("no compiler")
    with pytest.raises(RuntimeError, match=r"could not run compiled: RuntimeError: no compiler\..*`compile=False`"):
        speculate(target, None, "auto", **INVARIANT)
    target.train()
    with pytest.raises(ValueError, match=r"training mode\. Leave out `compile`"):
        speculate(target, None, "auto", **INVARIANT)


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_code_of_the_invariant_mode_in_which_rows_know_each_other_is_refused(
    target: PreTrainedModel, untraced: CountingBackend
) -> None:
    untraced.change = lambda outputs: tuple(part + part.shape[1] % 2 * 1e-3 for part in outputs)
    with pytest.raises(ValueError, match=r"rounds a row by what stands beside it when it runs compiled: only"):
        speculate(target, None, "auto", **INVARIANT)


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_code_of_the_invariant_mode_is_compared_once_under_each_setting(
    target: PreTrainedModel, untraced: CountingBackend
) -> None:
    speculate(target, None, FixedPolicy(TreeShape(1, 0, 1, lookup=6)), **INVARIANT)
    checked = target.speculation_state.invariant_calls.code.compared
    compared = len(checked)
    speculate(target, None, FixedPolicy(TreeShape(1, 0, 1, lookup=6)), **INVARIANT)
    assert compared and len(checked) == compared
    with deterministic_algorithms():
        speculate(target, None, FixedPolicy(TreeShape(1, 0, 1, lookup=6)), **INVARIANT)
    assert len(checked) == 2 * compared, "other settings may mean other kernels"


def test_without_kernels_of_ours_compiled_steps_of_the_invariant_mode_are_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"cannot run in torch.float64 here: only kernels of ours .* Leave out"):
        speculate(target, None, "auto", **INVARIANT)


def test_experts_that_go_by_the_number_of_rows_are_refused_with_compiled_code(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with AMX, where nothing but our kernels serves forwards of several sizes."""
    monkeypatch.setattr(RowClasses, "needs_of_experts", lambda self, target: RowNeeds(16, is_exact=True))
    with pytest.raises(ValueError, match=r"the experts of this model .* Leave out `compile`\."):
        speculate(target, None, "auto", **INVARIANT)


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_to_compiled_code_of_the_invariant_mode_no_path_costs_and_to_eager_code_each_does(
    target: PreTrainedModel, untraced: CountingBackend
) -> None:
    told = list[bool]()

    class Told(Policy):
        needs_head = False

        def choose(self, observation: Observation) -> TreeShape:
            told.append(observation.pricing.paths_cost)
            return TreeShape.plain()

    for compiles in (True, False):
        speculate(target, None, Told(), invariant=True, compile=compiles, max_new_tokens=4)
    assert set(told[:3]) == {False} and set(told[3:]) == {True}


@pytest.mark.usefixtures("with_kernels_of_ours")
def test_what_an_earlier_text_left_in_the_buffers_reaches_no_text_of_the_invariant_mode(
    target: PreTrainedModel, untraced: CountingBackend
) -> None:
    policy = FixedPolicy(TreeShape(1, 0, 1, lookup=6))
    first = speculate(target, None, policy, **INVARIANT)
    buffers = target.speculation_state.slot_engine.buffers
    for part in buffers.parts():
        part.fill_(torch.nan)
    assert speculate(target, None, policy, **INVARIANT).sequences.tolist() == first.sequences.tolist()
