"""What keeps the rows of a batch together."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tests.decoding.conftest import endless, head, target
from tests.decoding.rows import WIDE, prompts, speculate, uneven_steps
from tests.targets import VOCABULARY
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy
from transformers_resps.generation.plan import is_lockstep


__all__ = ["endless", "head", "target"]  # fixtures


class EveryThird(LogitsProcessor):
    """Stateful: forbids the best token of all rows at every third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        return scores if self.calls % 3 else scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


class StopAtTogether(StoppingCriteria):
    """Stops all rows once the first tokens of all of them add up."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), int(input_ids.sum()) > 250)


def count_rows(row: int, ids: torch.Tensor) -> list[int]:
    return [(row + int(ids[-1])) % VOCABULARY, (row + 3) % VOCABULARY]


COUPLED: dict[str, dict[str, Any]] = {
    "EveryThird": {"logits_processor": lambda: LogitsProcessorList([EveryThird()])},
    "StopAtTogether": {"stopping_criteria": lambda: StoppingCriteriaList([StopAtTogether()])},
    "PrefixConstrained": {"prefix_allowed_tokens_fn": lambda: count_rows},
    "guidance": {"guidance_scale": lambda: 1.5},
    "output_scores": {"output_scores": lambda: True},
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_looks_across_rows_keeps_them_together(name: str, target: PreTrainedModel, head: DraftHead) -> None:
    inputs = prompts(3)
    if name == "guidance":  # Transformers' own processor needs rows without padding
        inputs = {"input_ids": inputs["input_ids"].clamp(min=1)}

    def call(**extra: Any) -> Any:
        made = {option: make() for option, make in COUPLED[name].items()}
        return speculate(target, inputs, max_new_tokens=12, **made, **extra)

    tree = {"assistant_model": head, "policy": FixedPolicy(WIDE)}
    plain, out = call(), call(**tree)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert uneven_steps(out.speculation) == 0
    if name == "output_scores":
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`lockstep=False` does not work with .*Leave out `lockstep`"):
        call(**tree, lockstep=False)


def test_rows_that_go_on_after_their_stop_string_stay_together(endless: PreTrainedModel) -> None:
    """Without an end token plain decoding does not pad: a row that has stopped goes on until all have."""
    options = {"stop_strings": ["d"], "tokenizer": letter_tokenizer(), "max_new_tokens": 12}
    plain = endless.generate(**prompts(3), **options)
    tree = {"assistant_model": DraftHead.from_target(endless), "policy": FixedPolicy(WIDE)}
    out = speculate(endless, prompts(3), **options, **tree)
    assert out.sequences.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="without an end token"):
        speculate(endless, prompts(3), **options, **tree, lockstep=False)


def test_a_caller_may_keep_greedy_rows_together(target: PreTrainedModel, head: DraftHead) -> None:
    apart, together = (
        speculate(target, prompts(0), assistant_model=head, policy=FixedPolicy(WIDE), lockstep=lockstep)
        for lockstep in (None, True)
    )
    assert apart.sequences.tolist() == together.sequences.tolist()
    assert uneven_steps(apart.speculation) > 0 == uneven_steps(together.speculation)
    assert apart.speculation.target_forwards < together.speculation.target_forwards


def test_rows_is_lockstep_where_sampling_or_the_caller_or_a_reason_says_so() -> None:
    assert not is_lockstep(None, do_sample=False, reason=None)
    assert is_lockstep(None, do_sample=True, reason=None)
    assert is_lockstep(True, do_sample=False, reason=None)
    assert not is_lockstep(False, do_sample=True, reason=None)
    assert is_lockstep(None, do_sample=False, reason="a processor")


def test_lockstep_without_trees_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="without a draft head or a policy"):
        target.generate(**prompts(0), lockstep=False)
