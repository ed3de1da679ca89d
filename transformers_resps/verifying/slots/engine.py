"""Compile a target's forwards over static cache buffers, or capture them as CUDA graphs; keep code and buffers."""

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ...compat import CACHE_KEYWORD
from ...compilation.captured import CapturedFunction
from ...compilation.compiled import CompiledFunction
from ...compilation.engine import Code, CompileEngine, WeightFingerprint
from .buffers import SlotBuffers
from .forwards import SlotForward, steps_kind


_BUFFER_SIZES = "b.s."  # dimensions of a buffer, as in `SlotForward.sizes`
_CAPTURED_SIZES = (1, 2, 4, 8, 16, 32, 48, 64)  # numbers of nodes in captured graphs; larger ones are multiples of 64

# Relative difference of logits that weights rounded to 4 bits may cause; a wrong mask or layer causes a larger one.
_ROUNDED_TOLERANCE = 0.7


class SlotEngine(CompileEngine[PreTrainedModel]):
    """Compiles or captures the forwards of one target over static cache buffers, and owns these buffers."""

    name = "the target's forward"
    duration = "A small model takes less than a minute on two cores."

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self.buffers = SlotBuffers()
        self._pattern: tuple[Hashable, Cache] | None = None

    @torch.no_grad()
    def pattern(self, target: PreTrainedModel) -> Cache:
        """Return a dynamic cache of one token, from which callers read the shapes and dtypes of keys and values."""
        kind = target.dtype, target.device
        if self._pattern is None or self._pattern[0] != kind:
            cache = DynamicCache(config=target.config.get_text_config(decoder=True))
            token = torch.zeros(1, 1, dtype=torch.long, device=target.device)
            target(input_ids=token, use_cache=True, **{CACHE_KEYWORD: cache})
            self._pattern = kind, cache
        return self._pattern[1]

    @property
    def module(self) -> PreTrainedModel:
        return self.owner

    def fingerprint(self) -> WeightFingerprint:
        return WeightFingerprint(self.owner, self.owner.config.get_text_config()._attn_implementation)

    def is_stored(self, target: PreTrainedModel, *, is_batch: bool) -> bool:
        """Whether compiled code is stored on disk for steps over one row or, with `is_batch`, over several rows."""
        name = _code_name(steps_kind(target, is_batch=is_batch), is_batch)
        with self.borrow(target) as lent:
            return lent is not None and lent.packages.have(name)

    def identity(self, target: PreTrainedModel) -> str | None:
        """Return the name under which the target's compiled code is stored; `None` if another call uses the engine."""
        with self.borrow(target) as lent:
            return None if lent is None else lent.packages.identity

    def forward(
        self, forward: SlotForward, inputs: Sequence[Tensor], buffers: list[Tensor], row: int = 0
    ) -> tuple[Tensor, ...]:
        """Run `forward` compiled, or eagerly if that fails. If `buffers` hold only one row, `row` is its index."""
        outputs: tuple[Tensor, ...] | None = None
        if not self.is_broken:
            code = self._code_of(forward, inputs, row)
            outputs = self.run_packaged(code, inputs, buffers)  # stored code looks up no attention by name
            if outputs is None:
                with forward.running():
                    outputs = self.run(code, inputs, buffers)
        return forward(inputs, buffers) if outputs is None else outputs

    def _code_of(self, forward: SlotForward, inputs: Sequence[Tensor], row: int) -> Code:
        """Return the code for a forward. One row, a batch, each `row` and each set of layers have separate code."""
        is_batch = len(inputs[0]) > 1

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return forward.function(*tensors)

        def make() -> Code:
            fast: CompiledFunction | CapturedFunction
            if forward.is_captured or (inputs[0].device.type == "cuda" and forward.options is None):
                fast = CapturedFunction(run)
            else:
                fixed = "." if is_batch else ".b"
                *dynamic, of_buffers = [
                    [place for place, size in enumerate(part) if size not in fixed]
                    for part in (*forward.sizes, _BUFFER_SIZES)
                ]
                fast = CompiledFunction(
                    run,
                    dynamic,
                    of_buffers,
                    forward.options,
                    packages=self.packages,
                    name=_code_name(forward.kind, is_batch),
                    is_invariant=forward.is_invariant,
                    bits=forward.bits,
                )
            tolerance = None if forward.bits == 16 else _ROUNDED_TOLERANCE
            return Code(run, fast, _centred_logits, "logits", forward.target.dtype, tolerance)

        layers = () if forward.feature_layers is None else (*forward.feature_layers,)
        return self.code((forward.kind, is_batch, row, layers, str(forward.options)), make)


def _code_name(kind: str, is_batch: bool) -> str:
    """Return the name under which a forward's compiled code is stored; the name is the same in every process."""
    return f"{kind}, {'a batch' if is_batch else 'one row'}"


LEAST_ROWS = 4  # least number of rows of a CPU's forward: oneDNN takes longer for one or two than for four (measured)
FEW_BITS_LEAST_ROWS = 2  # the same for our kernels of few bits, for which each row takes time


def padded_count(device: torch.device, count: int, rows: int = 1, least: int = LEAST_ROWS) -> int:
    """Round up `count`, the nodes of each of `rows` trees, to a number for which compiled code exists or is fast.

    On a CPU all trees together have at least `least` nodes, and each has two.
    """
    if device.type != "cuda":  # compiled code runs any number from two on; on CUDA each number needs a graph
        return max(count, 2, -(-least // rows))
    return next((size for size in _CAPTURED_SIZES if size >= count), -(-count // 64) * 64)


def _centred_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    """Subtract each row's mean from the logits, which does not change their softmax."""
    return outputs[0] - outputs[0].mean(dim=-1, keepdim=True)
