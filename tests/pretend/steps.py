"""What a step asks of the pretend device beside the target's forward."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaForCausalLM

from transformers_resps import DraftHead, FixedPolicy, TreeShape
from transformers_resps.compilation.captured import CapturedFunction
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.drafting import Committed, DraftCall, DraftRequest
from transformers_resps.drafting.engine import DraftEngine, DraftEngines
from transformers_resps.heads import BlockHead
from transformers_resps.verifying.invariant import calls
from transformers_resps.verifying.slots.forwards import SlotForward
from transformers_resps.verifying.slots.verifier import SlotVerifier

from .counting import Count
from .device import move, on_device
from .pair import VOCABULARY, block, cycle, mtp, pair


_NEW_TOKENS = 48
_FORWARD_SECONDS, _READING_SECONDS = 8e-3, 2e-4

_TREE = {"with_head": True, "policy": FixedPolicy(TreeShape(8, 4, 2))}
_LARGE = {"with_head": True, "policy": FixedPolicy(TreeShape(60, 8, 10))}
_CAPTURED = {"captures": True}
_SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 8}
CALLS: dict[str, dict[str, Any]] = {
    "stock plain": {},
    "stock prompt lookup": {"prompt_lookup_num_tokens": 8},
    "plain": {"with_head": True, "policy": FixedPolicy(TreeShape.plain())},
    "8/4/2": _TREE,
    "60/8/10": _LARGE,
    "8/4/2 captured": _CAPTURED | _TREE,
    "60/8/10 captured": _CAPTURED | _LARGE,
    "auto captured": _CAPTURED | {"with_head": True, "policy": "auto"},
    "8/4/2 with one text": {"invariant": True} | _TREE,
    "8/4/2 with one text, captured": {"invariant": True} | _CAPTURED | _TREE,
    "8/4/2 in a window": {"window": 16} | _TREE,
    "8/4/2 in a window, captured": {"window": 16} | _CAPTURED | _TREE,
    "8/4/2 sampled": _TREE | _SAMPLED,
    "8/4/2 sampled, penalty": _TREE | _SAMPLED | {"repetition_penalty": 1.05},
    "8/4/2 of three rows": {"rows": 3} | _TREE,
    "auto": {"with_head": True, "policy": "auto"},
    "mtp 8/4/2": {"with_mtp": True, "policy": FixedPolicy(TreeShape(8, 4, 2))},
    "mtp 8/3/2": {"with_mtp": True, "policy": FixedPolicy(TreeShape(8, 3, 2))},
    "lookups": {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=8))},
}


class _Captured(CapturedFunction):
    """Counts as a graph does: one copy of all inputs and one launch. Nothing in it may wait."""

    def __init__(self, function: Callable[..., Any], count: Count) -> None:
        self.function, self.count = function, count

    def is_ready(self, inputs: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor] = ()) -> bool:
        return True

    def __call__(self, inputs: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor] = ()) -> Any:
        before = self.count.enter_region("captured")
        outputs = self.function(*inputs, *buffers)
        self.count.enter_region(before)
        self.count.kernels[before] += 2
        assert not self.count.waits["captured"], "a graph cannot wait for the host"
        return outputs


@contextmanager
def _forward_over_slots_captured(count: Count) -> Iterator[None]:
    """Inside, the forward over a tree is one launch with all that it computes from its inputs, masks above all."""
    run = SlotForward.__call__

    def launch(forward: SlotForward, *inputs: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        before = count.enter_region("captured")
        outputs = run(forward, *inputs, **options)
        count.enter_region(before)
        count.kernels[before] += 2
        return outputs

    is_compiled = property(lambda verifier: True, lambda verifier, value: None)
    with patch.object(SlotForward, "__call__", launch), patch.object(SlotVerifier, "is_compiled", is_compiled):
        yield


@dataclass(frozen=True)
class StepCount:
    """Means over the steps of one call.

    Attributes:
        kernels: launched beside the target's forward.
        waits: host synchronisations beside the target's forward.
        most_waits: of the step with most of them.
        tokens: emitted.
        sites: `kind file:line` -> synchronisations.
    """

    kernels: float
    waits: float
    most_waits: int
    tokens: float
    sites: dict[str, float]


class _Steps:
    """Follows the target's forwards: a step lasts from the beginning of one to the beginning of the next."""

    def __init__(self, count: Count, target: LlamaForCausalLM) -> None:
        self.count, self.begun = count, list[tuple[int, int]]()
        self.forwards = self.readings = 0
        target.register_forward_pre_hook(lambda *_: self._begin())
        target.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self.forwards += 1
        if self.forwards == 2:  # what follows the prompt is no step
            self.count.sites.clear()
        self.begun.append((self.count.kernels["step"], self.count.waits["step"]))
        self.count.enter_region("target")

    def _end(self) -> None:
        self.count.enter_region("step")

    def clock(self) -> float:
        """Seconds that depend on no machine and on no count: a policy decides the same, whatever a step asks for."""
        self.readings += 1
        return self.forwards * _FORWARD_SECONDS + self.readings * _READING_SECONDS

    def counted(self, new_tokens: int) -> StepCount:
        each = [(end[0] - start[0], end[1] - start[1]) for start, end in pairwise(self.begun[1:])]
        kernels, waits = zip(*each, strict=True)
        sites = Counter({f"{kind} {where}": seen for (kind, where), seen in self.count.sites.items()})
        return StepCount(
            kernels=sum(kernels) / len(each),
            waits=sum(waits) / len(each),
            most_waits=max(waits),
            tokens=new_tokens / self.forwards,
            sites={site: seen / len(each) for site, seen in sites.most_common()},
        )


def prompt(rows: int = 1) -> torch.Tensor:
    """`[rows, s]` pieces of the coming text, so that lookups are right for a while, and its beginning."""
    following, text = cycle().tolist(), [1]
    while len(text) < VOCABULARY:
        text.append(following[text[-1]])
    pieces = [text[start : start + 5] for start in (40, 8, 24, 32, 16)]
    row = torch.tensor([token for piece in pieces for token in piece] + text[:1])
    return torch.stack([row.roll(6 * place) for place in range(rows)])


def generate(models: tuple[Any, DraftHead | None], ids: torch.Tensor, **call: Any) -> torch.Tensor:
    """A call with the same seed everywhere; `with_head` drafts."""
    options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "attention_mask": None} | call
    if options.pop("with_head", False):
        options["assistant_model"] = models[1]
    if options.pop("with_mtp", False):
        options["assistant_model"] = module = mtp(models[0])
        move(module)
    if options["attention_mask"] is None:
        options["attention_mask"] = torch.ones_like(ids)
    torch.manual_seed(0)
    with torch.no_grad():
        made: torch.Tensor = models[0].generate(ids, **options)
    return made


def count_layer() -> int:
    """Kernels of the decoder layer of an MTP module, over a level of two nodes."""
    target, _ = moved_pair()
    module, counts, found = mtp(target), Count(), list[int]()
    move(module)

    def begin(*_: Any) -> None:
        counts.enter_region("layer")
        counts.kernels["layer"] = 0

    def end(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        found.append(counts.kernels["layer"] if output.shape[1] == 2 else 0)
        counts.enter_region("step")

    block: Any = module.layers[0].block
    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)
    with counts:
        generate((target, None), on_device(prompt()), assistant_model=module, policy=FixedPolicy(TreeShape(8, 4, 2)))
    return max(found)


# What a block head adds to a plain one
BLOCKS: dict[str, dict[str, Any]] = {
    "block": {},
    "causal block of a window": {"causal": [True, True], "windows": [64, 64]},
    "block of a draft vocabulary": {"draft_vocab_size": 112, "owns_output_head": True},
    "corrected block": {"correction": "vanilla", "correction_rank": 8},
    "corrected block with confidence": {
        "correction": "gated",
        "correction_rank": 8,
        "confidence": True,
        "confidence_with_markov": True,
    },
    "selected block": {"correction": "selector", "correction_rank": 8, "selector_top_k": 16},
}


def count_block(name: str, *, captures: bool = False) -> dict[str, int]:
    """Kernels of one block draft below two new tokens, those of its layers apart, and host synchronisations."""
    target, _ = moved_pair()
    head, counts = block(target, **BLOCKS[name]), Count()
    move(head)
    write = BlockHead.write_context

    def layers(run: Callable[..., Any], *given: Any) -> Any:
        before = counts.enter_region("layers")
        found = run(*given)
        counts.enter_region(before)
        return found

    engines = DraftEngines(partial(DraftEngine, lambda function: _Captured(function, counts))) if captures else None
    tokens, width = on_device(prompt()), 3 * VOCABULARY
    features = on_device(torch.randn(1, tokens.shape[1], width))
    request = DraftRequest(TreeShape(33, 7, 32))
    with torch.no_grad(), counts, ExitStack() as stack:
        stack.enter_context(patch.object(BlockHead, "write_context", lambda *given: layers(write, *given)))
        for layer in head.layers:
            stack.enter_context(patch.object(layer, "forward", partial(layers, layer.forward)))
        drafter = head.drafter(DraftCall(target, engines=engines, ends=stack))
        for start, end in ((0, -2), (-2, tokens.shape[1])):
            counts.kernels.clear()
            counts.waits.clear()
            drafter.observe(Committed(tokens[:, start:end], features[:, start:end]))
            drafter.draft(tokens[:, :end], request)
    return {"kernels": counts.kernels["step"], "layers": counts.kernels["layers"], "waits": sum(counts.waits.values())}


def count(name: str) -> StepCount:
    """Count the steps of one of `CALLS`."""
    target, head = moved_pair()
    state, counts = target.speculation_state, Count()
    with torch.no_grad(), Count():
        state.slot_engine.pattern(target)  # reads a token, which is no step
    steps = _Steps(counts, target)
    keywords: Any = TreeDecoding.__init__.__kwdefaults__
    clock: Callable[[], float] = keywords["clock"]
    keywords["clock"] = steps.clock
    try:
        call = dict(CALLS[name])
        head.config.sliding_window = call.pop("window", None)
        ids = on_device(prompt(call.pop("rows", 1)))
        with counts, ExitStack() as stack:
            stack.enter_context(patch.object(calls, "_of_weights", lambda *_: ()))
            if call.pop("captures", False):
                made = partial(DraftEngine, lambda function: _Captured(function, counts))
                state.draft_engines = DraftEngines(made)
                call |= {} if "invariant" in call else {"cache_implementation": "static"}
                stack.enter_context(_forward_over_slots_captured(counts))
            text = generate((target, head), ids, **call)
    finally:
        keywords["clock"] = clock
    return steps.counted(text.shape[1] - ids.shape[1])


def moved_pair() -> tuple[LlamaForCausalLM, DraftHead]:
    """Target and head on the device."""
    target, head = pair()
    move(target)
    move(head)
    return target, head
