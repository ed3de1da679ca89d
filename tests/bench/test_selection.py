import pytest

from tests.bench.conversations import dialogue
from transformers_resps.bench.selection import check_apart
from transformers_resps.data import prompt_fingerprint


def test_prompts_that_were_learned_from_are_refused() -> None:
    rows = [dialogue("d/0", "new"), dialogue("d/1", "Known  question\n")]
    with pytest.raises(ValueError, match="1 of 2 prompts .* among the training prompts of head, for example d/1"):
        check_apart(rows, {prompt_fingerprint("Known question")}, "the training prompts of head")
    check_apart(rows[:1], {prompt_fingerprint("Known question")}, "the training prompts of head")
