"""What an accelerator does: texts of one row whose picks are told for all nodes at once, through `generate`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, set_seed

from tests.lossless.answering import SAMPLING, WIDE, Heard, Restive, both
from tests.lossless.test_options import OPTIONS, StopAfter
from transformers_resps import DraftHead, FixedPolicy, TreeShape
from transformers_resps.decoding import acceptance
from transformers_resps.decoding.acceptance import Picks


IN_COMMIT_ORDER = {"prefix constraint", "watermark", "synthid", "guidance scale", "guidance scale, sampled"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The nodes of every step that picked at once."""
    seen: list[int] = []

    def spied(tree: Any, logits: torch.Tensor, processed: Any) -> Any:
        seen.append(tree.node_count)
        return read(tree, logits, processed)

    read = Picks.read
    monkeypatch.setattr(Picks, "read", spied)
    monkeypatch.setattr(acceptance, "can_pick_at_once", lambda device, do_sample, vocabulary: True)
    yield seen


@pytest.mark.parametrize("name", OPTIONS)
def test_texts_and_random_numbers_are_those_of_plain_decoding(
    name: str, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, steps: list[int]
) -> None:
    def write(**drafting: Any) -> tuple[list[list[int]], list[int]]:
        steps.clear()
        set_seed(len(name))
        text = target.generate(prompt, **{"max_new_tokens": 24} | OPTIONS[name] | drafting)
        return text.tolist(), torch.get_rng_state().tolist()

    plain = write()
    for shape in (WIDE, TreeShape(6, 5, 1, lookup=3), TreeShape(1, 0, 1)):
        assert write(assistant_model=head, policy=FixedPolicy(shape)) == plain, shape
        if name in IN_COMMIT_ORDER:
            assert not steps
        elif OPTIONS[name].get("do_sample"):
            assert steps


def test_scores_logits_and_streams_are_those_of_plain_decoding(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, steps: list[int]
) -> None:
    heard = Heard()
    asked = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3, "streamer": heard}
    plain, tree = both(target, head, prompt, **SAMPLING, **asked)
    half = len(heard.values) // 2
    assert heard.values[:half] == heard.values[half:] and heard.ended == 2
    for ours, theirs in ((tree.scores, plain.scores), (tree.logits, plain.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)
    assert steps


@pytest.mark.parametrize(
    "unknown",
    [
        {"logits_processor": lambda: LogitsProcessorList([Restive(3)])},
        {"stopping_criteria": lambda: StoppingCriteriaList([StopAfter((15,))])},
    ],
    ids=["processor", "criterion"],
)
def test_what_is_unknown_is_asked_once_per_committed_token(
    unknown: dict[str, Any], target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, steps: list[int]
) -> None:
    found = []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(WIDE)}):
        parts = {name: make() for name, make in unknown.items()}
        set_seed(0)
        text = target.generate(prompt, max_new_tokens=20, **SAMPLING, **parts, **extra)
        calls = [part.calls for part in parts.get("logits_processor", ())]
        found.append((text.tolist(), calls, torch.get_rng_state().tolist()))
    assert found[0] == found[1]
    assert not steps


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_padding_of_a_static_cache_is_not_picked_at(
    penalty: float, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, steps: list[int]
) -> None:
    options = SAMPLING | {"cache_implementation": "static", "disable_compile": True, "repetition_penalty": penalty}
    plain, tree = both(target, head, prompt, TreeShape(7, 3, 3), **options)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert any(count not in (1, 2, 4, 8) for count in steps), "no tree was padded: nothing was shown"


def test_rows_in_lockstep_draw_together(target: PreTrainedModel, head: DraftHead, steps: list[int]) -> None:
    ids = torch.arange(3, 15).reshape(2, 6)
    plain, tree = both(target, head, ids, **SAMPLING)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert not steps
