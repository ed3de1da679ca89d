"""Seeded calls of tiny targets: options of `generate`, batches, architectures, caches; what their steps decided."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, set_seed

from tests.decisions.planted import PlantedClock, decision
from tests.decoding.rows import AnyShape, prompts
from tests.lossless.answering import WIDE
from tests.lossless.test_options import OPTIONS
from tests.targets import ARCHITECTURES, Architecture
from transformers_resps import DraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy


PROMPT = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
Call = Callable[[], Any]


def small_head(target: Any) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


def re_sps(head: DraftHead) -> Policy:
    torch.manual_seed(3)
    grid = ActionGrid((TreeShape.plain(), TreeShape(6, 2, 3), TreeShape(12, 3, 4)))
    return ReSpSPolicy(ReSpSConfig(head.config.features_width, grid, persistence=2, sample=True))


def policies(head: DraftHead) -> dict[str, Policy]:
    return {
        "wide": FixedPolicy(WIDE),
        "auto": BaselineGuard(ThroughputPolicy()),
        "guarded tree": BaselineGuard(FixedPolicy(TreeShape(8, 3, 2, 4))),
        "re-sps": re_sps(head),
    }


def tiny_calls() -> Iterator[tuple[str, Call]]:
    """Named calls that return what `generate` returns."""
    target = attach(Architecture("llama", {"eos_token_id": 2, "max_position_embeddings": 64}).build("sdpa"))
    head = small_head(target)
    for option, options in OPTIONS.items():
        for name, policy in policies(head).items():
            yield f"{option}, {name}", _call(target, head, policy, {"input_ids": PROMPT}, options)
    yield from _batches(target)
    yield from _architectures()
    yield from _caches(target, head)


def _call(target: Any, head: DraftHead | None, policy: Policy, inputs: Any, options: dict[str, Any]) -> Call:
    def call() -> Any:
        set_seed(0)
        made = {"max_new_tokens": 24, "return_dict_in_generate": True, **options}
        return target.generate(**inputs, assistant_model=head, policy=PlantedClock(policy), **made)

    return call


def _batches(target: Any) -> Iterator[tuple[str, Call]]:
    head = small_head(target)
    for seed in range(4):
        for lockstep in (True, False):
            for do_sample in (False, True) if lockstep else (False,):
                options = {"lockstep": lockstep, "do_sample": do_sample, "eos_token_id": [2, 6]}
                name = f"batch {seed}, lockstep {lockstep}, sampled {do_sample}"
                yield f"{name}, any shape", _call(target, head, AnyShape(seed), prompts(seed), options)
                guarded = BaselineGuard(ThroughputPolicy())
                yield f"{name}, auto", _call(target, head, guarded, prompts(seed), options)


def _architectures() -> Iterator[tuple[str, Call]]:
    for architecture in ARCHITECTURES:
        for attention in architecture.attention:
            target = attach(architecture.build(attention))
            call = _call(target, small_head(target), AnyShape(1), {"input_ids": PROMPT}, {"max_new_tokens": 12})
            yield f"{architecture}, {attention}", call


def _caches(target: Any, head: DraftHead) -> Iterator[tuple[str, Call]]:
    options = {"cache_implementation": "static"}
    yield "static cache", _call(target, head, AnyShape(2), {"input_ids": PROMPT}, options)
    yield "no head", _call(target, None, AnyShape(4), {"input_ids": PROMPT}, {})

    def continued() -> Any:
        cache = DynamicCache(config=target.config)
        first = _call(target, head, AnyShape(5), {"input_ids": PROMPT}, {CACHE_KEYWORD: cache})()
        options = {CACHE_KEYWORD: first[CACHE_KEYWORD]}
        return _call(target, head, AnyShape(6), {"input_ids": first.sequences}, options)()

    yield "continued from a returned cache", continued


def decided(output: Any) -> dict[str, Any]:
    """The text of a call, and what each step decided."""
    steps = [decision(record) for record in output.speculation.steps]
    return {"sequences": output.sequences.tolist(), "steps": steps}
