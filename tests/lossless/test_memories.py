"""Whatever a memory holds, calls write what plain `generate` writes, and remember what they wrote."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.drafting.test_suffix_memory import texts_of
from tests.lossless.hybrids import AnyShape
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, SuffixMemory, TreeShape, attach
from transformers_resps.compat import HAS_RECURRENT_STATES
from transformers_resps.drafting import DraftCall


PROMPTS = torch.tensor([[5, 7, 1, 3, 9, 7, 1], [0, 0, 4, 8, 4, 8, 4]])
MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
BATCH = {"input_ids": PROMPTS, "attention_mask": MASK, "pad_token_id": 0}
ONE = {"input_ids": PROMPTS[:1], "attention_mask": MASK[:1], "pad_token_id": 0}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("qwen3").build("sdpa"))


def written(target: PreTrainedModel, **options: Any) -> Any:
    set_seed(0)
    return target.generate(return_dict_in_generate=True, max_new_tokens=30, **options)


def warmed(target: PreTrainedModel, shift: int = 0) -> SuffixMemory:
    """It holds the plain answers; with a shift the same contexts, but another token at each third place."""
    memory = SuffixMemory()
    for row in written(target, do_sample=False, **BATCH).sequences.tolist():
        memory.add([[(token + shift * (at % 3 == 0)) % VOCABULARY for at, token in enumerate(row)]] * 3)
    return memory


KINDS = ["empty", "right", "hostile"]


def memory_of(kind: str, target: PreTrainedModel) -> SuffixMemory:
    return SuffixMemory() if kind == "empty" else warmed(target, shift=int(kind == "hostile"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "policy",
    [None, FixedPolicy(TreeShape(6, 2, 2, lookup=5)), "auto", AnyShape(3)],
    ids=["default", "fixed", "auto", "any"],
)
def test_a_head_and_a_memory_write_the_plain_text(
    target: PreTrainedModel, head: DraftHead, kind: str, inputs: Any, do_sample: bool, policy: Any
) -> None:
    expected = written(target, do_sample=do_sample, **inputs).sequences
    for sources in ([head, memory_of(kind, target)], memory_of(kind, target)):
        if isinstance(sources, list) or not isinstance(policy, FixedPolicy | AnyShape):
            found = written(target, do_sample=do_sample, assistant_model=sources, policy=policy, **inputs)
            assert found.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3-Next"])
@pytest.mark.skipif(not HAS_RECURRENT_STATES, reason="this release refuses targets with recurrent layers")
def test_recurrent_targets_write_the_plain_text(name: str) -> None:
    from tests.lossless.test_sources import VOCABULARY as FEW
    from tests.lossless.test_sources import target_of

    hybrid, memory = target_of(name), SuffixMemory()
    inputs = {"input_ids": PROMPTS[:1] % FEW, "do_sample": False}
    expected = written(hybrid, **inputs).sequences
    memory.add(expected)
    for _ in range(2):
        found = written(hybrid, assistant_model=memory, **inputs)
        assert found.sequences.tolist() == expected.tolist()
    assert found.speculation.accepted_by_source.memory > 10


def test_what_was_written_once_is_written_again_in_few_forwards(target: PreTrainedModel) -> None:
    memory = SuffixMemory()
    forwards = []
    for _ in range(2):
        found = written(target, do_sample=True, assistant_model=memory, **ONE)
        forwards.append(found.speculation.target_forwards)
    assert forwards[1] < 0.6 * forwards[0]
    report = found.speculation
    by_source = report.accepted_by_source
    assert by_source.memory > 5 and by_source.drafter == 0
    assert sum(by_source) == sum(step.accepted_total for step in report.steps)


def test_calls_remember_answers_or_prompts_too_in_the_first_memory(target: PreTrainedModel) -> None:
    for remember in ("answers", "all"):
        near, far = SuffixMemory(remember=remember), SuffixMemory()
        out = written(target, do_sample=False, eos_token_id=[2, 6], assistant_model=[near, far], **BATCH)
        answers = [
            row[: next((at + 1 for at, token in enumerate(row) if token in (2, 6)), len(row))]
            for row in out.sequences[:, 7:].tolist()
        ]
        prompts = [[5, 7, 1, 3, 9, 7, 1], [4, 8, 4, 8, 4]] if remember == "all" else [[], []]
        assert texts_of(near) == [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        assert len(far) == 0


def test_nothing_is_remembered_of_a_call_that_fails(target: PreTrainedModel) -> None:
    memory = SuffixMemory(remember="all")

    def fail(row: int, text: Any) -> list[int]:
        if len(text) > 12:
            raise RuntimeError("interrupted")
        return list(range(VOCABULARY))

    with pytest.raises(RuntimeError, match="interrupted"):
        written(target, assistant_model=memory, prefix_allowed_tokens_fn=fail, **ONE)
    assert len(memory) == 0


def test_a_memory_is_a_default_of_attach() -> None:
    model, memory = Architecture("qwen3").build("sdpa"), SuffixMemory()
    attach(model, assistant_model=memory)
    expected = written(model, policy="plain", do_sample=False, **ONE).sequences
    assert len(memory) == 0
    assert written(model, do_sample=False, **ONE).sequences.tolist() == expected.tolist()
    assert len(memory) == 31


def test_a_policy_that_never_looks_up_is_refused_beside_a_memory(target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match=r"asks for no looked-up nodes, and the call has a memory. Pass a shape with"):
        written(target, assistant_model=[head, SuffixMemory()], policy=FixedPolicy(TreeShape(6, 2, 2)), **ONE)
    with pytest.raises(ValueError, match="the call has none"):
        written(target, assistant_model=SuffixMemory(), policy=FixedPolicy(TreeShape(6, 2, 2, 4)), **ONE)


def test_a_memory_drafts_in_transformers_own_loop(target: PreTrainedModel) -> None:
    """As a candidate generator, which stock decoding takes."""
    memory, text = SuffixMemory(), torch.arange(1, 18)[None]
    memory.add(text)
    candidates, _ = memory.drafter(DraftCall(target)).get_candidates(text[:, :8])
    assert candidates.tolist() == text[:, :13].tolist()
