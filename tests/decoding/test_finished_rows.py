"""Rows that have finished while others go on: no forward, no draft, no record of them."""

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.decoding.rows import WIDE, prompts, speculate
from tests.targets import VOCABULARY
from transformers_resps import DraftHead, FixedPolicy, TreeShape


@pytest.mark.parametrize("do_sample", [False, True])
def test_finished_rows_cost_nothing(target: PreTrainedModel, head: DraftHead, do_sample: bool) -> None:
    seen: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    try:
        set_seed(1)
        inputs, options = prompts(1), {"do_sample": do_sample, "eos_token_id": [2, 6]}
        out = speculate(target, inputs, assistant_model=head, policy=FixedPolicy(WIDE), **options)
    finally:
        hook.remove()
    unfinished = [4, *(step.decoded_rows for step in out.speculation.steps[1:])]
    assert seen == unfinished
    assert seen[-1] < 4, "all rows ended together: nothing was shown"
    assert out.speculation.tau == out.speculation.emitted / sum(step.decoded_rows for step in out.speculation.steps)


def test_the_head_drafts_for_unfinished_rows_only(target: PreTrainedModel, head: DraftHead) -> None:
    class Watching(FixedPolicy):
        rows: list[int] = []

        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
            self.rows.append(len(scores))
            return super().size(scores, levels)

    policy = Watching(WIDE)
    out = speculate(target, prompts(1), assistant_model=head, policy=policy, eos_token_id=[2, 6])
    drafted = [step.decoded_rows for step in out.speculation.steps[1:] if step.shape.asks_head]
    assert policy.rows == drafted and policy.rows[-1] < 4


def test_a_finished_row_that_stays_says_nothing_about_the_head(target: PreTrainedModel) -> None:
    """A head that proposes every token but the padding, so it drafts whatever a row that goes on writes."""
    drafter = DraftHead.from_target(target, draft_token_ids=torch.arange(1, VOCABULARY))
    options = {"output_scores": True, "suppress_tokens": [0], "eos_token_id": [2, 6]}  # the first keeps rows together
    policy = FixedPolicy(TreeShape(VOCABULARY, 1, VOCABULARY))
    policy.needs_drafted_match = True
    steps = speculate(target, prompts(1), assistant_model=drafter, policy=policy, **options).speculation.steps
    drafted = [step for step in steps if step.shape.asks_head]
    assert min(step.decoded_rows for step in drafted) < 4, "no row ended before the others: nothing was shown"
    assert all(int(step.drafted_match) == 1 for step in drafted)
