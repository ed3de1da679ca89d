"""Keeps the KV cache and the compiled code or captured CUDA graphs of each draft source from call to call."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..compilation.captured import CapturedFunction
from ..compilation.compiled import CompiledFunction
from ..compilation.engine import Code, CompileEngine, WeightFingerprint, is_of_this_mode
from ..tree import CandidatePool, DraftTree
from .cache import DraftCache
from .passes import Draft, DraftPass, Found, Given, run_eager
from .pool_growth import Root
from .step_model import StepModel
from .text import Pairs, Prefix


# Maximum number of unprocessed tokens: their features take more memory than keys, and the next draft must read them.
MAX_UNREAD = 64
_EXAMPLE_SIZES = {"t": 3, "k": 4, "n": 6, "e": 7, "s": 11}  # Sizes to compile a pass with; all differ.

Capture = Callable[[Callable[..., tuple[Tensor, ...]]], CapturedFunction]


class DraftEngine(CompileEngine[StepModel]):
    """Runs one source's drafts fast: captures a CUDA graph for each shape, or compiles each pass once for all sizes.

    `capture` turns a function into one that runs in a single launch. By default drafts are captured as CUDA graphs on
    a GPU, and passes are compiled on other devices.
    """

    name = "the draft head"
    duration = "A small head takes half a minute on two cores."

    def __init__(self, capture: Capture | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self._capture = capture
        self._cache: DraftCache | None = None
        self._in_batch = False
        self.rounds = True  # whether compiled passes may read weights rounded to int8

    @property
    def module(self) -> nn.Module:
        return self.owner.modules

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner.modules, any(part.training for part in self.owner.modules))

    def cache(self, rows: int) -> DraftCache:
        """Return a cache for a call with `rows` texts: the cache of earlier calls if it fits, otherwise a new one."""
        model, cache = self.owner, self._cache
        self._in_batch = rows > 1
        keys = cache.buffers[0] if cache is not None and cache.buffers else None
        is_same = keys is not None and (len(keys), keys.dtype, keys.device) == (rows, model.dtype, model.device)
        if cache is None or keys is None or not is_same or not is_of_this_mode(keys):
            cache = self._cache = model.cache(None)
        return cache

    def draft(
        self, draft: Draft[Any], pairs: Pairs | None, text: Prefix, before: Root | None
    ) -> tuple[Root, CandidatePool, DraftTree | None]:
        """Run `draft` by a captured graph, by compiled passes, or eagerly; for the arguments see `Draft.__call__`.

        Returns the root, the pool, and the tree (`None` without a graph). All are valid until the next draft.
        """
        captures = self._capture is not None or self.owner.device.type == "cuda"
        count = 0 if pairs is None else pairs.tokens.shape[1]
        # Each number of pairs needs its own graph. After a step there is at most one pair more than drafted levels.
        if captures and pairs is not None and draft.goes_on is None and count <= draft.shape.depth + 1:
            outputs = self._launched(draft, draft.tensors(pairs, text), text.cache)
            if outputs is not None:
                return draft.found(outputs, pairs.tokens[:, -1])
        is_eager = captures or count > MAX_UNREAD
        return *draft(pairs, text, before, run_eager if is_eager else self.run_pass), None

    def _launched(self, draft: Draft[Any], inputs: Sequence[Tensor], cache: DraftCache) -> tuple[Tensor, ...] | None:
        """Run a whole draft by a captured graph, captured now if missing; return its outputs, `None` if this fails."""
        if self.is_broken or not cache.buffers:
            return None
        kind, shape, tree_room, count = type(draft), draft.shape, cache.tree_room, len(inputs)

        def whole_draft(*tensors: Tensor) -> tuple[Tensor, ...]:
            return kind(self.owner, shape).of_tensors(DraftCache(tensors[count:], tree_room), *tensors[:count])

        def make() -> Code:
            fast = (self._capture or CapturedFunction)(whole_draft)
            return Code(whole_draft, fast, lambda outputs: outputs[3], "log probabilities", cache.buffers[0].dtype)

        outputs: tuple[Tensor, ...] | None = self.run(
            self.code((shape, inputs[1].shape[1], tree_room), make), inputs, cache.buffers
        )
        return outputs

    def run_pass(self, one: DraftPass[Given, Found], given: Given) -> Found:
        """Run a pass by compiled code, or eagerly if there is no compiled code for it or the code fails."""
        cache = given.text.cache
        outputs = None if self.is_broken or not cache.buffers else self._run_compiled(one, one.tensors(given), cache)
        return one(given) if outputs is None else one.trimmed(outputs, given)

    def _run_compiled(self, one: DraftPass[Given, Found], inputs: Sequence[Tensor], cache: DraftCache) -> Any:
        is_batch = len(inputs[0]) > 1
        code = self._pass_code(one, cache, is_batch)
        outputs = self.run_packaged(code, inputs, cache.buffers)
        if outputs is not None:
            return outputs
        is_ready = code.fast.is_ready(inputs, cache.buffers)
        if not is_ready:
            if is_batch is not self._in_batch or code in self._missing:  # the last row of a batch gets no code
                return None
            self.prepare(code, *_example(one, inputs, cache.buffers))
        return self.run(code, inputs, cache.buffers, is_ready=is_ready)

    def _pass_code(self, one: DraftPass[Given, Found], cache: DraftCache, is_batch: bool) -> Code:
        kind, count, tree_room = type(one), len(one.sizes), cache.tree_room

        def draft_pass(*tensors: Tensor) -> Any:
            return kind(self.owner).of_tensors(DraftCache(tensors[count:], tree_room), *tensors[:count])

        def make() -> Code:
            fixed = "1*" if is_batch else "1*b"
            dynamic = [tuple(at for at, size in enumerate(sizes) if size not in fixed) for sizes in one.sizes]
            bits = 8 if self.rounds else 16
            rows = "a batch" if is_batch else "one row"
            name = f"drafts {one.name}, {rows}, up to {tree_room} nodes, weights of {bits} bits"
            of_buffers = (0, 2) if is_batch else (2,)
            fast = CompiledFunction(draft_pass, dynamic, of_buffers, packages=self.packages, name=name, bits=bits)
            return Code(draft_pass, fast, _scores, "log probabilities", cache.buffers[0].dtype)

        return self.code((one.name, tree_room, is_batch, self.rounds), make)


def _scores(outputs: Any) -> Tensor:
    """Return the path scores in the outputs of a pass. Padding, with a score of -inf, gets 0."""
    scores: Tensor = outputs[1].scores
    return scores.nan_to_num(neginf=0.0)


def _example(
    one: DraftPass[Given, Found], inputs: Sequence[Tensor], buffers: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return example inputs and buffers whose sizes all differ: the compiler assumes that equal sizes stay equal."""
    sizes = _EXAMPLE_SIZES | {"b": min(len(inputs[0]), 2)}
    made = []
    for part, letters in zip(inputs, one.sizes, strict=True):
        for dimension, letter in enumerate(letters):
            if letter in sizes:
                places = torch.arange(sizes[letter], device=part.device) % part.shape[dimension]
                part = part.index_select(dimension, places)
        made.append(torch.ones_like(part) if part.dtype == torch.bool else part)  # visible keys, to avoid NaN
    return made, [part[: sizes["b"]].clone(memory_format=torch.contiguous_format) for part in buffers]


class DraftEngines:
    """Holds a `DraftEngine` for each source until the source is deleted. Copies and pickles hold no engines."""

    def __init__(self, make: Callable[[], DraftEngine] = DraftEngine) -> None:
        self._make = make
        self._engines: WeakKeyDictionary[object, DraftEngine] = WeakKeyDictionary()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngines"], tuple[()]]:
        return DraftEngines, ()

    def borrow(
        self, source: object, model: StepModel, *, waits: bool = True, rounds: bool = True
    ) -> AbstractContextManager[DraftEngine | None]:
        """Return a context that reserves the engine of `source` for one call; `model` is the source bound to a target.

        It yields the engine, or `None` if another call uses it or if `model.is_compilable` or `model.has_fixed_places`
        is false. With `rounds`, compiled passes may read int8 weights. For `waits` see `CompileEngine.borrow`.
        """
        if not model.is_compilable or not model.has_fixed_places:
            return nullcontext()
        with self._lock:
            engine = self._engines.get(source)
            if engine is None:
                engine = self._engines[source] = self._make()
            engine.rounds = rounds
        return engine.borrow(model, waits=waits)

    @property
    def lack_code(self) -> bool:
        """Whether any source's newest call ran some passes eagerly because it did not wait for the compiler."""
        return any(engine.lacks_code for engine in self._engines.values())
