"""What a target keeps from call to call for forwards over slots: the buffers and the compiled code."""

import logging
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compilation.captured import CapturedFunction
from ..compilation.compiled import FAULTS, CompiledFunction, WeightFingerprint, described, disagreement
from .attention import use_gqa_attention
from .slots import SlotBuffers, SlotForward, SlotInputs


logger = logging.getLogger(f"transformers.{__name__}")

_CAPTURED_SIZES = (1, 2, 4, 8, 16, 32, 48, 64)
_EXPECTED_SECONDS = 90.0  # of compiling a small model on two cores, until it was measured
# The dimensions of `SlotInputs` and of the buffers that change, with several rows.
_SIZES = ((0, 1), (0, 1), (0, 1, 2), (0, 1), (0, 1), (0,))
_BUFFER_SIZES = (0, 1)


class SlotEngine:
    """Runs slot functions of one target. One call of `generate` uses it at a time.

    An attached model owns one. A copied or pickled model starts anew.

    Attributes:
        obstacle: what it warned of last; `None` if nothing has stood against compiling.
    """

    def __init__(self, *, compiles: bool = True) -> None:
        self.buffers = SlotBuffers()
        self.compiles = compiles
        self._functions: dict[Hashable, CompiledFunction | CapturedFunction] = {}
        self._fingerprint: WeightFingerprint | None = None
        self._compile_seconds, self._decoded_seconds = _EXPECTED_SECONDS, 0.0
        self._warned: set[str] = set()
        self.obstacle: str | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["SlotEngine"], tuple[()]]:
        return SlotEngine, ()

    @contextmanager
    def borrow(self, target: PreTrainedModel) -> Iterator["SlotEngine"]:
        """Lend this engine, without code that was compiled for other weights. While another call uses it, lend one
        that does not compile.
        """
        if not self._lock.acquire(blocking=False):
            yield SlotEngine(compiles=False)
            return
        try:
            if self._fingerprint is not None and self._fingerprint != _fingerprint(target):
                self._functions.clear()
                self.compiles, self._fingerprint = True, None
            yield self
        finally:
            if self._fingerprint is None and (self._functions or not self.compiles):  # also of a call that was cut
                self._fingerprint = _fingerprint(target)
            self._lock.release()

    @property
    def is_compiled(self) -> bool:
        """Whether there is compiled code."""
        return bool(self._functions)

    @property
    def pays(self) -> bool:
        """Whether compiled code is there, or decoding has taken as long as compiling will: the model lives on."""
        return self.is_compiled or self._decoded_seconds >= self._compile_seconds

    def note(self, seconds: float) -> None:
        """Note that a call has decoded for so long."""
        self._decoded_seconds += seconds

    def node_count(self, device: torch.device, count: int) -> int:
        """Nodes of a forward over a tree of `count`, padding included: few sizes where each is captured by itself.

        On a CPU one code serves all sizes from two nodes on, and a second node costs nothing.
        """
        if device.type != "cuda":
            return max(count, 2)
        return next((size for size in _CAPTURED_SIZES if size >= count), -(-count // 64) * 64)

    def must_compile(self, forward: SlotForward, inputs: SlotInputs, buffers: list[Tensor]) -> bool:
        """Whether the coming forward, the first of its kind, takes longer than all that follow."""
        made = self._functions.get(_kind(forward, inputs))
        return self.compiles and (made is None or not made.is_ready(inputs, buffers))

    def run(self, forward: SlotForward, inputs: SlotInputs, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """Run a forward compiled, or as it is where that fails."""
        if not self.compiles:
            return forward(inputs, buffers)
        try:
            with use_gqa_attention(forward.target):
                if self.must_compile(forward, inputs, buffers):
                    return self._first(forward, inputs, buffers)
                outputs: tuple[Tensor, ...] = self._functions[_kind(forward, inputs)](inputs, buffers)
                return outputs
        except FAULTS as fault:
            self._give_up(described(fault))
        return forward(inputs, buffers)

    def _first(self, forward: SlotForward, inputs: SlotInputs, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """The first run of compiled code. It must give what the eager forward gives."""
        expected = forward(inputs, buffers)  # first: Transformers adds the hooks that are compiled at an eager call
        kind = _kind(forward, inputs)
        if kind not in self._functions:
            logger.warning("Compiling the target's forward, once. A small model takes up to two minutes on two cores.")
            self._functions[kind] = _made(forward, inputs)
        elif isinstance(self._functions[kind], CompiledFunction):
            logger.warning(
                "Compiling the target's forward again, because inference mode, autocast or the number of threads has "
                "changed. Call `generate` in the same way every time."
            )
        started = time.perf_counter()
        outputs: tuple[Tensor, ...] = self._functions[kind](inputs, buffers)
        self._compile_seconds = time.perf_counter() - started
        difference = disagreement(_centred(outputs[0]), _centred(expected[0]), forward.target.dtype)
        if difference is not None:
            self._give_up(f"its logits {difference}")
            return expected
        return outputs

    def warn(self, reason: str) -> None:
        """Warn, once for each reason, that the target's forward runs as it is."""
        self.obstacle = reason
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(f"The target's forward runs without compilation: {reason}.")

    def _give_up(self, reason: str) -> None:
        self.compiles = False
        self._functions.clear()
        self.warn(reason)


def _centred(logits: Tensor) -> Tensor:
    """Without what softmax ignores."""
    return logits - logits.mean(dim=-1, keepdim=True)


def _fingerprint(target: PreTrainedModel) -> WeightFingerprint:
    return WeightFingerprint(target, target.config.get_text_config()._attn_implementation)


def _kind(forward: SlotForward, inputs: SlotInputs) -> Hashable:
    """What compiled code can serve: a single row or several, and the features of one head."""
    return len(inputs.tokens) > 1, *forward.feature_layers, str(forward.options)


def _made(forward: SlotForward, inputs: SlotInputs) -> CompiledFunction | CapturedFunction:
    if inputs.tokens.device.type == "cuda" and forward.options is None:
        return CapturedFunction(forward.function)
    if len(inputs.tokens) > 1:
        return CompiledFunction(forward.function, _SIZES, _BUFFER_SIZES, forward.options)
    dynamic = [tuple(size for size in sizes if size) for sizes in _SIZES]  # one row stays one row
    return CompiledFunction(forward.function, dynamic, _BUFFER_SIZES[:1], forward.options)
