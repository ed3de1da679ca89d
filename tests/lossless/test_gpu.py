"""The contract, costs and synchronisations on a GPU; on a CPU the same bodies run as far as they can.

The targets never write a near-tie, so that texts in bfloat16 are equal, too.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.decoding.test_loop import BUDGETS
from tests.lossless.answering import both
from tests.targets import Architecture
from training.studies.random_target import following, random_target
from training.studies.rigged_head import rigged_head
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, calibrate
from transformers_resps.verifying.invariant import calls


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.bfloat16]
TREE = FixedPolicy(TreeShape(12, 4, 3, lookup=4))
WIDE = TreeShape(40, 3, 19, lookup=4)  # so wide that most picks are drafted
STATIC = {"cache_implementation": "static"}
# How a text is written, and what drafts it; `None` for the head.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tree": ({}, {"policy": TREE}),
    "chain": ({}, {"policy": FixedPolicy(TreeShape(8, 7, 1))}),
    "60/8/10": ({}, {"policy": FixedPolicy(TreeShape(60, 8, 10))}),
    "auto": ({}, {"policy": "auto"}),
    "lookups": ({}, {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=8)), "assistant_model": None}),
    "processed": ({"repetition_penalty": 1.1}, {"policy": TREE}),
    "in chunks": ({"prefill_chunk_size": 8}, {"policy": TREE}),
    "static": (STATIC | {"disable_compile": True}, {"policy": TREE}),
}
MOST = 40  # new tokens


@cache
def rigged(device: str, dtype: torch.dtype) -> tuple[Any, DraftHead, Tensor]:
    """A target, a head that is right three times of four, and a prompt."""
    target = attach(random_target("tiny", dtype, device))
    head = rigged_head(target, following(512), 0.75).head
    return target, head, torch.arange(5, 25, device=device)[None]


def texts_of(model: Any, head: Any, ids: Tensor, writing: dict[str, Any], drafting: dict[str, Any]) -> tuple[Any, Any]:
    """The same call plainly and with trees: what it returns."""
    call = {"do_sample": False, "max_new_tokens": MOST, "return_dict_in_generate": True} | writing
    call["attention_mask"] = call.get("attention_mask", torch.ones_like(ids))
    found = []
    for extra in ({}, {"assistant_model": head} | drafting):
        torch.manual_seed(0)
        found.append(model.generate(ids, **call, **extra))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_text_is_that_of_plain_decoding(device: str, call: str, dtype: torch.dtype) -> None:
    plain, tree = texts_of(*rigged(device, dtype), *CALLS[call])
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.sequences.device.type == device
    assert len(tree.speculation.steps) < MOST or call in ("lookups", "auto"), "nothing was accepted"


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_padded_batch_is_that_of_plain_decoding_seed_for_seed(device: str, do_sample: bool) -> None:
    target = attach(Architecture("llama", {"eos_token_id": 2}).build("sdpa").to(device, torch.float32))
    torch.manual_seed(1)
    ids = torch.randint(3, 19, (3, 11), device=device)
    mask = (torch.arange(11) >= torch.tensor([[0], [4], [7]])).long().to(device)
    for rows in (1, 3):
        own = {"input_ids": (ids * mask)[-rows:], "attention_mask": mask[-rows:]}
        plain, tree = both(target, DraftHead.from_target(target), own, WIDE, do_sample=do_sample)
        assert tree.sequences.tolist() == plain.sequences.tolist()
        assert tree.speculation.tau > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiled", [{"compile": True}, STATIC], ids=["compile=True", "as stock compiles"])
@pytest.mark.parametrize("device", [CUDA])
def test_a_compiled_text_is_that_of_plain_decoding(device: str, compiled: dict[str, Any], dtype: torch.dtype) -> None:
    """Twice, so that what was recorded is used again; a longer text outgrows its buffers."""
    model, head, ids = rigged(device, dtype)
    for policy in (FixedPolicy(TreeShape.plain()), TREE, FixedPolicy(TreeShape(8, 7, 1)), "auto"):
        for most in (MOST // 2, MOST, MOST):
            plain, tree = texts_of(model, head, ids, {"max_new_tokens": most}, {"policy": policy} | compiled)
            assert tree.sequences.tolist() == plain.sequences.tolist()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariant mode is refused on a GPU until these tests have passed on one."""
    monkeypatch.setattr(calls, "TRIED_DEVICES", ("cpu", "cuda"))


def written_alike(target: Any, ids: Tensor, **options: Any) -> tuple[list[int], list[Tensor]]:
    """The text of a call in the invariant mode, and the logits of each token."""
    call = {"do_sample": False, "max_new_tokens": MOST, "attention_mask": torch.ones_like(ids), "invariant": True}
    found = target.generate(ids, **call, **options, return_dict_in_generate=True, output_logits=True)
    return found.sequences[0].tolist(), [row.cpu() for row in found.logits]


ON_CUDA = [
    pytest.param("cuda", compiled, dtype, marks=CUDA.marks)
    for compiled in (False, True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("device", "compiled", "dtype"), [("cpu", False, torch.bfloat16), *ON_CUDA], ids=str)
@pytest.mark.usefixtures("tried")
def test_in_the_invariant_mode_logits_are_equal_to_the_bit(device: str, compiled: bool, dtype: torch.dtype) -> None:
    """Not the rigged target: of one whose layers add something, and whose near-ties would show."""
    sizes = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15}
    target = attach(Architecture("llama", sizes).build("sdpa").to(device, dtype))
    head = DraftHead.from_target(target).to(dtype)
    ids = torch.randint(3, 19, (1, 7), generator=torch.Generator().manual_seed(0)).repeat(1, 17).to(device)
    text, logits = written_alike(target, ids, compile=compiled)
    wide, lookups = FixedPolicy(TreeShape(40, 3, 8)), FixedPolicy(TreeShape(1, 0, 1, lookup=8))
    for policy, chunk in ((TREE, None), (wide, 11), (lookups, 32), ("auto", None)):
        drafting = {"assistant_model": head, "policy": policy, "prefill_chunk_size": chunk}
        found = written_alike(target, ids, compile=compiled, **drafting)
        assert found[0] == text and all(map(torch.equal, found[1], logits)), policy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("tried")
def test_in_the_invariant_mode_a_row_of_a_batch_is_the_row_alone(device: str) -> None:
    target = attach(Architecture("llama", {"max_position_embeddings": 512}).build("sdpa").to(device, torch.bfloat16))
    ids = torch.randint(3, 19, (3, 70), generator=torch.Generator().manual_seed(1)).to(device)
    call = {"do_sample": False, "max_new_tokens": MOST, "invariant": True}
    drafting = {"assistant_model": DraftHead.from_target(target).bfloat16(), "policy": FixedPolicy(WIDE)}
    found = target.generate(ids, attention_mask=torch.ones_like(ids), **call, **drafting)
    for row in range(3):
        assert found[row].tolist() == written_alike(target, ids[row : row + 1])[0]


@pytest.mark.parametrize("device", DEVICES)
def test_costs_are_measured_on_the_device(device: str, tmp_path: Path) -> None:
    target = attach(Architecture("llama", {"max_position_embeddings": 48}).build("sdpa").to(device, torch.float32))
    costs = calibrate(target, DraftHead.from_target(target), folder=tmp_path)
    assert all(seconds > 0 for row in costs.verify.values() for seconds in row.values())
    assert all(seconds > 0 for seconds in costs.draft.values())


@pytest.fixture
def waits() -> Iterator[list[warnings.WarningMessage]]:
    """What PyTorch says of every synchronisation of host and GPU while a test runs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def waits_beside(target: PreTrainedModel, said: list[warnings.WarningMessage], call: dict[str, Any]) -> float:
    """Synchronisations of a step of one call beside the target's forward, the prompt and what follows it left out."""
    marks: list[int] = []

    def mark(*_: Any) -> None:
        marks.append(sum("synchronizing" in str(one.message) for one in said))

    hooks = [target.register_forward_pre_hook(mark), target.register_forward_hook(mark)]
    try:
        target.generate(**call)
    finally:
        for hook in hooks:
            hook.remove()
    begun, ended = marks[::2], marks[1::2]
    steps = [start - end for end, start in zip(ended[1:-1], begun[2:], strict=True)]
    return sum(steps) / len(steps)


SYNCED: dict[str, dict[str, Any]] = {
    "stock plain": {},
    "stock prompt lookup": {"prompt_lookup_num_tokens": 8},
    "plain": {"with_head": True, "policy": FixedPolicy(TreeShape.plain())},
    "8/4/2": {"with_head": True, "policy": FixedPolicy(TreeShape(8, 4, 2))},
    "60/8/10": {"with_head": True, "policy": FixedPolicy(TreeShape(60, 8, 10))},
    "auto": {"with_head": True, "policy": "auto"},
    "lookups": {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=8))},
}


@pytest.mark.parametrize("call", SYNCED)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_no_more_often_than_on_the_pretend_device(
    device: str, call: str, waits: list[warnings.WarningMessage]
) -> None:
    target, head, ids = rigged(device, torch.float32)
    options = dict(SYNCED[call])
    if options.pop("with_head", False):
        options["assistant_model"] = head
    asked = {"inputs": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": MOST}
    assert waits_beside(target, waits, asked | options) <= BUDGETS[call][1]
