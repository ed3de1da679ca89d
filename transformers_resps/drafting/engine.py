"""What drafting keeps from call to call: for each source its cache, and captured drafts or a compiled pass."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..compilation.captured import CapturedFunction
from ..compilation.compiled import CompiledFunction
from ..compilation.engine import Code, CompileEngine, WeightFingerprint, is_of_this_mode
from ..tree import CandidatePool, DraftTree, TreeShape
from .blocks import BlockInputs, BlockPass, BlockPaths
from .cache import DraftCache
from .levels import LEAST_TOKENS, DraftFunction, LevelForward, PassFunction, PassInputs
from .pool_growth import Frontier, Growth, RunLevel
from .step_model import StepModel


Capture = Callable[[Callable[..., tuple[Tensor, ...]]], CapturedFunction]


class DraftEngine(CompileEngine[StepModel]):
    """Captures whole drafts of one source, each shape once; or compiles a pass, once for all sizes, and once more for
    newest pairs whose features it fuses by weights. A pass over a block is a whole draft.

    Args:
        capture: makes of a function one that runs as one launch. By default a CUDA graph on a GPU; elsewhere passes
            are compiled.
        clock: seconds.
    """

    name = "the draft head"
    duration = "A small head takes half a minute on two cores."

    def __init__(self, capture: Capture | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self._capture = capture
        self._cache: DraftCache | None = None
        self._in_batch = False

    @property
    def module(self) -> nn.Module:
        return self.owner.modules

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner.modules, any(part.training for part in self.owner.modules))

    def cache(self, rows: int) -> DraftCache:
        """The source's cache for a call with so many rows, at the same place as in earlier calls."""
        model, cache = self.owner, self._cache
        self._in_batch = rows > 1
        keys = cache.buffers[0] if cache is not None and cache.buffers else None
        is_same = keys is not None and (len(keys), keys.dtype, keys.device) == (rows, model.dtype, model.device)
        if cache is None or keys is None or not is_same or not is_of_this_mode(keys):
            cache = self._cache = DraftCache.empty(model, rows)
        return cache

    @property
    def captures(self) -> bool:
        """Whether whole drafts run as one launch."""
        return not self.is_broken and self._makes_captures

    @property
    def compiles(self) -> bool:
        """Whether passes run compiled, one by one."""
        return not self.is_broken and not self._makes_captures

    @property
    def _makes_captures(self) -> bool:
        return self._capture is not None or self.owner.device.type == "cuda"

    def draft(
        self, kind: type[DraftFunction], shape: TreeShape, cache: DraftCache, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, CandidatePool, DraftTree] | None:
        """Draft over the cache of this engine with one launch, or capture first.

        `inputs` are `NewestPairs`. Returns the model's output at the newest pair, the pool and the tree, until the
        next draft; `None` where capturing fails.
        """
        tree_room, pairs = cache.tree_room, inputs[1].shape[1]

        def draft(*tensors: Tensor) -> tuple[Tensor, ...]:
            return kind(self.owner, shape, tree_room)(*tensors)

        def make() -> Code:
            fast = (self._capture or CapturedFunction)(draft)
            return Code(draft, fast, kind.scores, "log probabilities", cache.buffers[0].dtype)

        outputs = self.run(self.code((shape, pairs, tree_room), make), inputs, cache.buffers)
        return None if outputs is None else kind(self.owner, shape, tree_room).unpack(outputs)

    def levels(self, forward: LevelForward) -> RunLevel:
        """The levels of one draft, compiled; as they are where that fails, or where whole drafts are captured."""
        if self._makes_captures:
            return forward

        def run(frontier: Frontier, level: int, is_last: bool) -> Growth:
            found = self.grow(forward.cache, forward.tensors(frontier, level)) if self.compiles else None
            return forward(frontier, level, is_last) if found is None else _narrowed(found[1], frontier)

        return run

    def grow(self, cache: DraftCache, inputs: PassInputs, *, fuses: bool = False) -> tuple[Tensor, Growth] | None:
        """Run a pass over the cache of this engine, compiled; see `PassFunction`.

        Returns `None` where that fails, or is not worth a compilation, or where whole drafts are captured.
        """
        grown: tuple[Tensor, Growth] | None = self._run_pass(PassFunction, cache, inputs, fuses=fuses)
        return grown

    def fill(self, cache: DraftCache, inputs: BlockInputs, levels: int) -> tuple[Tensor, BlockPaths] | None:
        """As `grow`, over a block of so many levels; see `BlockPass`."""
        filled: tuple[Tensor, BlockPaths] | None = self._run_pass(BlockPass, cache, inputs, levels=levels)
        return filled

    def _run_pass(
        self,
        kind: type[PassFunction | BlockPass],
        cache: DraftCache,
        inputs: PassInputs | BlockInputs,
        **setting: int,
    ) -> Any:
        if not self.compiles or not cache.buffers:
            return None
        is_batch, tensors = len(inputs.tokens) > 1, inputs.filled_up()
        code = self._pass_code(kind, cache, is_batch, setting)
        outputs = self.run_packaged(code, tensors, cache.buffers)
        if outputs is not None:
            return outputs
        is_ready = code.fast.is_ready(tensors, cache.buffers)
        if not is_ready:
            if is_batch is not self._in_batch or code in self._missing:  # the rest of a batch is not worth it
                return None
            self.prepare(code, *_example(inputs, cache.buffers))
        return self.run(code, tensors, cache.buffers, is_ready=is_ready)

    def _pass_code(
        self, kind: type[PassFunction | BlockPass], cache: DraftCache, is_batch: bool, setting: dict[str, int]
    ) -> Code:
        tree_room, make_pass = cache.tree_room, cast(Any, kind)

        def draft_pass(*tensors: Tensor) -> tuple[Tensor, Any]:
            drafted: tuple[Tensor, Any] = make_pass(self.owner, tree_room, **setting)(*tensors)
            return drafted

        def make() -> Code:
            *own, of_last = kind.dynamic  # which has no rows
            rows, of_buffers = ((0,), (0, 2)) if is_batch else ((), (2,))
            dynamic = [*((*rows, *sizes) for sizes in own), of_last]
            name = f"{kind.__name__} {setting} of {type(self.owner).__name__}, {tree_room} slots, {is_batch=}"
            fast = CompiledFunction(draft_pass, dynamic, of_buffers, packages=self.packages, name=name)
            return Code(draft_pass, fast, kind.scores, "log probabilities", cache.buffers[0].dtype)

        return self.code((kind, tree_room, is_batch, *setting.values()), make)


def _narrowed(growth: Growth, frontier: Frontier) -> Growth:
    """Without the nodes that a level of one was filled up with, from which the best child may come as well."""
    following = growth.frontier
    if frontier.tokens.shape[1] > 1 or growth.best is None or following is None or following.hidden is None:
        return growth
    seen = following.visible[:, :1]
    narrow = Frontier(
        following.tokens[:, :1],
        following.scores[:, :1],
        following.hidden[:, :1],
        torch.cat([seen[..., :1], seen[..., LEAST_TOKENS:]], dim=-1),
    )
    return Growth(narrow.tokens[:, None], narrow.scores[:, None], torch.zeros_like(growth.best[:, :1]), narrow)


def _example(inputs: PassInputs | BlockInputs, buffers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    made = inputs.example()
    return [part.clone(memory_format=torch.contiguous_format) for part in made], [
        part[: len(made[0])].clone(memory_format=torch.contiguous_format) for part in buffers
    ]


class DraftEngines:
    """An engine for each source that a model drafts with, as long as that lives. A copied model starts anew."""

    def __init__(self, make: Callable[[], DraftEngine] = DraftEngine, *, waits: bool = True) -> None:
        self._make, self._waits = make, waits
        self._engines: WeakKeyDictionary[object, DraftEngine] = WeakKeyDictionary()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngines"], tuple[()]]:
        return DraftEngines, ()

    def borrow(self, source: object, model: StepModel) -> AbstractContextManager[DraftEngine | None]:
        """Lend the engine of a source that drafts as `model`; nothing while another call uses it, or where the model
        cannot run as compiled code, or its angles of positions depend on the text's length.
        """
        if not model.is_compilable or not model.has_fixed_places:
            return nullcontext()
        with self._lock:
            engine = self._engines.get(source)
            if engine is None:
                engine = self._engines[source] = self._make()
        return engine.borrow(model, waits=self._waits)

    @property
    def readily(self) -> "DraftEngines":
        """The same engines for a call that waits for no compiler."""
        ready = DraftEngines(self._make, waits=False)
        ready._engines, ready._lock = self._engines, self._lock
        return ready

    @property
    def lack_code(self) -> bool:
        """Whether a newest call would have waited for a compiler."""
        return any(engine.lacks_code for engine in self._engines.values())
