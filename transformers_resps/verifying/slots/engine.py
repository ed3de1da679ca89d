"""The one owner of a target's compiled and captured forwards over slots, and of its buffers."""

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


_BUFFER_SIZES = "b.s."  # dimensions of a buffer by letters, as in `SlotForward.sizes`
_CAPTURED_SIZES = (1, 2, 4, 8, 16, 32, 48, 64)  # nodes of captured graphs; beyond, multiples of 64


class SlotEngine(CompileEngine[PreTrainedModel]):
    """Compiles or captures the forwards of one target over slots, and keeps its buffers."""

    name = "the target's forward"
    duration = "A small model takes less than a minute on two cores."

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock=clock)
        self.buffers = SlotBuffers()
        self._pattern: tuple[Hashable, Cache] | None = None

    @torch.no_grad()
    def pattern(self, target: PreTrainedModel) -> Cache:
        """Make a dynamic cache of one token, which shows how the target's layers keep entries."""
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
        """Whether code for such steps is stored, by another process or by a call that waited."""
        name = _code_name(steps_kind(target, is_batch=is_batch), is_batch)
        with self.borrow(target) as lent:
            return lent is not None and lent.packages.have(name)

    def identity(self, target: PreTrainedModel) -> str | None:
        """Return the name of the target among packages; `None` while another call has the engine."""
        with self.borrow(target) as lent:
            return None if lent is None else lent.packages.identity

    def forward(
        self, forward: SlotForward, inputs: Sequence[Tensor], buffers: list[Tensor], row: int = 0
    ) -> tuple[Tensor, ...]:
        """Run a forward compiled, or eagerly where that fails. If buffers are one row's, `row` is its index."""
        outputs: tuple[Tensor, ...] | None = None
        if not self.is_broken:
            code = self._code_of(forward, inputs, row)
            outputs = self.run_packaged(code, inputs, buffers)  # asks for no attention by its name
            if outputs is None:
                with forward.running():
                    outputs = self.run(code, inputs, buffers)
        return forward(inputs, buffers) if outputs is None else outputs

    def _code_of(self, forward: SlotForward, inputs: Sequence[Tensor], row: int) -> Code:
        """Find the code, one for a single row and one for several; a graph serves one row, and one head's features."""
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
                )
            return Code(run, fast, _centred_logits, "logits", forward.target.dtype)

        layers = () if forward.feature_layers is None else (*forward.feature_layers,)
        return self.code((forward.kind, is_batch, row, layers, str(forward.options)), make)


def _code_name(kind: str, is_batch: bool) -> str:
    """Name a forward's code alike in every process."""
    return f"{kind}, {'a batch' if is_batch else 'one row'}"


LEAST_ROWS = 4  # rows of a forward on a CPU: oneDNN takes longer for one or two than for four (measured)


def padded_count(device: torch.device, count: int, rows: int = 1) -> int:
    """Pad the nodes of `rows` trees of `count`: on CUDA, where each size is captured, to few sizes.

    On a CPU one code serves all sizes from two nodes on.
    """
    if device.type != "cuda":
        return max(count, 2, -(-LEAST_ROWS // rows))
    return next((size for size in _CAPTURED_SIZES if size >= count), -(-count // 64) * 64)


def _centred_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    """Subtract the mean, which softmax ignores."""
    return outputs[0] - outputs[0].mean(dim=-1, keepdim=True)
