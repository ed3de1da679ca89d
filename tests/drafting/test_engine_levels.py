"""Compiled levels of a draft: what eager levels give, one compilation for all sizes, and eager after a fault."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from tests.drafting.test_model_drafter import pairs
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.assistants.mtp import MtpHead
from transformers_resps.assistants.mtp_layouts import MtpConfig
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.compilation.packages import FOLDER_VARIABLE, stored_packages
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.engine import DraftEngine, DraftEngines
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.heads import BoundHead
from transformers_resps.tree import CandidatePool
from transformers_resps.verifying.slots.verifier import SlotVerifier


NEWEST = torch.empty(0)  # levels are drafted from what was observed


TREES = (TreeShape(9, 2, 3), TreeShape(40, 4, 2), TreeShape(60, 3, VOCABULARY))
CHAIN = TreeShape(5, 4, 1)
CODES = 2  # one reads pairs and drafts the first level, one passes over levels


class Compiler:
    """Compiles nothing, which takes a hundred seconds of its clock, but counts; `backend` traces as well."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.traces = clock, False
        self.count = self.runs = 0
        self.fault: Exception | None = None
        self.change: Callable[[Any], Any] = lambda outputs: outputs
        self._stock = torch.compile

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if self.traces:
            return self._stock(function, backend=self._backend, fullgraph=options["fullgraph"])
        fresh = [True]
        return lambda *tensors: self._run(function, fresh, *tensors)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward

    def _run(self, function: Callable[..., Any], fresh: list[bool], *tensors: torch.Tensor) -> Any:
        self.runs += 1
        while fresh:
            fresh.pop()
            self.count += 1
            self.clock.advance(100.0)
        if self.fault is not None:
            raise self.fault
        return self.change(function(*tensors))


@pytest.fixture
def compiler(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    made = Compiler(fake_clock)
    monkeypatch.setattr(compiled_function.torch, "compile", made)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.fixture
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


class Both:
    """Two generators that read the same text, one of which drafts with an engine."""

    def __init__(
        self, bound: BoundHead, engine: DraftEngine | None, rows: int, mask: torch.Tensor | None = None
    ) -> None:
        self.features, self.tokens = pairs(bound.head, rows, 150)
        self.generators = [ModelDrafter(bound, rows, mask, lent) for lent in (engine, None)]
        self.read = 0

    def observe(self, count: int, counts: list[int] | None = None) -> None:
        if self.read == 0 and count > 1:  # all but the newest are a prompt, which no draft reads
            self.observe(count - 1)
            count = 1
            for generator in self.generators:
                generator.read()
        new = slice(self.read, self.read + count)
        self.read += count
        rows = None if counts is None else [[0] * own for own in counts]
        for generator in self.generators:
            generator.observe(Committed(self.tokens[:, new], self.features[:, new], rows))

    def drafts(self, shape: TreeShape) -> tuple[CandidatePool, CandidatePool]:
        compiled, eager = (generator.draft(NEWEST, DraftRequest(shape)) for generator in self.generators)
        return compiled, eager

    def agree(self, shape: TreeShape) -> None:
        compiled, eager = self.drafts(shape)
        for name in CandidatePool.__slots__:
            torch.testing.assert_close(getattr(compiled, name), getattr(eager, name))


@torch.no_grad()
def test_one_code_serves_pairs_trees_chains_and_texts_of_all_sizes(
    target: PreTrainedModel, head: DraftHead, compiler: Compiler
) -> None:
    """From a text of a single token to one that outgrows the cache's first buffers, and sizes equal by chance."""
    compiler.traces = True
    head.config.sliding_window = 64
    bound = BoundHead(head, target)
    with DraftEngine(clock=compiler.clock).borrow(bound) as engine:
        both = Both(bound, engine, rows=1)
        for length, shape in ((1, TREES[0]), (3, TREES[1]), (2, TREES[2]), (60, TREES[0]), (80, TREES[1])):
            both.observe(length)
            both.agree(shape)
        assert compiler.count == CODES
        for waiting in (2, 1):
            both.observe(waiting)
            both.agree(CHAIN)
        assert compiler.count == CODES


@torch.no_grad()
def test_code_of_a_head_with_a_draft_vocabulary_is_kept_for_later_processes(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By PyTorch's own compiler."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    caplog.set_level("INFO", "transformers")
    head = DraftHead.from_target(target, draft_token_ids=list(range(0, VOCABULARY, 2)))
    bound = BoundHead(head, target)
    for _ in range(2):
        with DraftEngine().borrow(bound) as engine:
            both = Both(bound, engine, rows=1)
            both.observe(5)
            both.agree(TREES[0])
            assert engine is not None and engine.is_compiled and not engine.is_broken
    assert len(stored_packages(tmp_path)) == CODES
    assert sum("Compiling the draft head" in line for line in caplog.messages) == 1


@torch.no_grad()
def test_a_draft_runs_compiled_code_once_for_each_level(
    target: PreTrainedModel, head: DraftHead, compiler: Compiler
) -> None:
    bound = BoundHead(head, target)
    with DraftEngine(clock=compiler.clock).borrow(bound) as engine:
        both = Both(bound, engine, rows=1)
        both.observe(5)
        both.agree(TREES[0])
        for waiting, depth in ((1, 1), (2, 1), (9, 2)):
            runs = compiler.runs
            both.observe(waiting)
            both.agree(TreeShape(9, depth, 3))
            assert compiler.runs - runs == depth
        assert compiler.count == CODES


@pytest.mark.parametrize("ids", [None, tuple(range(1, VOCABULARY, 2))])
@torch.no_grad()
def test_an_mtp_layer_drafts_by_compiled_levels_and_one_with_experts_as_it_is(
    compiler: Compiler, ids: tuple[int, ...] | None
) -> None:
    compiler.traces = True
    target = Architecture("qwen3").build("sdpa")
    module = MtpHead(MtpConfig(draft_token_ids=ids), target).to(target.dtype).eval()
    model, width = module.bind(target), target.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    with DraftEngines().borrow(module, model) as engine:
        drafters = [ModelDrafter(model, 1, None, lent) for lent in (engine, None)]
        for length, shape in ((5, TREES[0]), (3, TREES[1]), (60, TREES[0])):
            tokens = torch.randint(VOCABULARY, (1, length), generator=generator)
            features = torch.randn(1, length, width, generator=generator, dtype=target.dtype)
            pools = []
            for drafter in drafters:
                drafter.observe(Committed(tokens, features))
                pools.append(drafter.draft(NEWEST, DraftRequest(shape)))
            for name in CandidatePool.__slots__:
                torch.testing.assert_close(getattr(pools[0], name), getattr(pools[1], name))
    assert compiler.count == CODES
    sparse = Architecture("qwen3_moe").build("sdpa")
    module = MtpHead(MtpConfig(experts=(True,)), sparse)
    with DraftEngines().borrow(module, module.bind(sparse)) as engine:
        assert engine is None


@torch.no_grad()
def test_ragged_and_padded_rows_are_compiled_once_and_what_is_left_of_them_is_not(
    target: PreTrainedModel, head: DraftHead, compiler: Compiler
) -> None:
    compiler.traces = True
    bound, mask = BoundHead(head, target), torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [1] * 6])
    with DraftEngine().borrow(bound) as engine:
        both = Both(bound, engine, rows=3, mask=mask)
        both.observe(6)
        both.agree(TREES[0])
        both.observe(3, [3, 1, 2])
        both.agree(TREES[1])
        for rows in ([0, 2], [1]):
            for generator in both.generators:
                generator.keep_rows(rows)
            both.features, both.tokens = both.features[rows], both.tokens[rows]
            both.observe(2)
            both.agree(TREES[1])
        assert compiler.count == CODES


@torch.no_grad()
def test_seconds_of_compiling_are_taken_once(target: PreTrainedModel, head: DraftHead, compiler: Compiler) -> None:
    bound = BoundHead(head, target)
    with DraftEngine(clock=compiler.clock).borrow(bound) as engine:
        assert engine is not None
        both = Both(bound, engine, rows=1)
        both.observe(5)
        both.drafts(TREES[0])
        assert (engine.take_compile_seconds(), engine.take_compile_seconds()) == (100.0 * CODES, 0.0)
        both.drafts(TREES[1])
        assert engine.take_compile_seconds() == 0.0 and compiler.runs > 2


def _of_head(head: DraftHead, target: PreTrainedModel) -> None:
    head.norm.weight.data.mul_(1.5)


def _of_target(head: DraftHead, target: PreTrainedModel) -> None:
    target.get_input_embeddings().weight.mul_(1.5)


@pytest.mark.parametrize("change", [None, _of_head, _of_target])
@torch.no_grad()
def test_a_later_call_compiles_again_only_if_weights_of_head_or_target_changed(
    target: PreTrainedModel, head: DraftHead, compiler: Compiler, change: Callable[..., None] | None
) -> None:
    engine = DraftEngine()
    for _ in range(2):
        bound = BoundHead(head, target)
        with engine.borrow(bound) as lent:
            both = Both(bound, lent, rows=1)
            both.observe(5)
            both.agree(TREES[0])
        if change is not None:
            change(head, target)
    assert compiler.count == (CODES if change is None else 2 * CODES)


def with_other_scores(outputs: Any) -> Any:
    return outputs[0], outputs[1]._replace(scores=outputs[1].scores * 1.01)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("no memory"), RuntimeError("no C++ compiler"), None])
@torch.no_grad()
def test_what_cannot_be_compiled_or_gives_other_scores_runs_as_it_is_with_one_warning(
    target: PreTrainedModel,
    head: DraftHead,
    compiler: Compiler,
    caplog: pytest.LogCaptureFixture,
    fault: Exception | None,
) -> None:
    compiler.fault = fault
    if fault is None:
        compiler.change = with_other_scores
    bound = BoundHead(head, target)
    with DraftEngine().borrow(bound) as engine:
        both = Both(bound, engine, rows=1)
        for _ in range(2):
            both.observe(5)
            both.agree(TREES[1])
    assert compiler.count == 1
    reason = "its log probabilities differ from the eager ones" if fault is None else str(fault)
    assert [reason in line for line in caplog.messages if "The draft head runs without compilation" in line] == [True]


@pytest.mark.parametrize("traces", [False, True])
@torch.no_grad()
def test_a_head_that_the_caller_drops_is_freed(target: PreTrainedModel, compiler: Compiler, traces: bool) -> None:
    """The traced function itself stays with PyTorch until `torch._dynamo.reset`."""
    compiler.traces, engines = traces, DraftEngines()

    def of_a_call() -> list[weakref.ref[Any]]:
        bound = BoundHead(DraftHead.from_target(target), target)
        with engines.borrow(bound.head, bound) as engine:
            both = Both(bound, engine, rows=1)
            both.observe(5)
            both.agree(TREES[0])
        assert compiler.count == CODES
        return [weakref.ref(bound.head), weakref.ref(engine)]

    head, engine = of_a_call()
    gc.collect()
    assert head() is None and (traces or engine() is None)


def test_no_step_pays_for_compiling(
    target: PreTrainedModel, head: DraftHead, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that pass for compiled, by a clock that only compiling moves."""
    monkeypatch.setattr(SlotVerifier, "is_compiled", property(lambda self: True, lambda self, value: None), False)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", compiler.clock)
    target.speculation_state.draft_engines = DraftEngines(lambda: DraftEngine(clock=compiler.clock))
    options = {"assistant_model": head, "policy": FixedPolicy(TREES[1]), "cache_implementation": "static"}
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    out = target.generate(prompt, max_new_tokens=12, **options, return_dict_in_generate=True)
    assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    assert out.speculation.compile_seconds == 100.0 * CODES
    assert {step.step_seconds for step in out.speculation.steps} == {0.0}
