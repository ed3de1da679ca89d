"""The head's forward against itself: what is left out must not be missed."""

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps.heads import DraftHead, HeadCache


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_the_newest_output_alone_is_the_last_of_all_outputs(
    tiny_target: PreTrainedModel, layers: int, padded: bool
) -> None:
    head = DraftHead.from_target(tiny_target, draft_vocab_size=48, num_hidden_layers=layers).eval()
    hidden, embeddings = torch.randn(2, 2, 9, 32).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if padded else None
    if mask is not None:
        mask[0, :, 1:, 0] = False
    outputs = []
    with torch.no_grad():
        for wanted in (slice(None), slice(-1, None)):
            cache = HeadCache.empty(head.config, 2, torch.float32, head.device)
            attend = cache.attend_from(0, mask, is_causal=mask is None)
            outputs.append(head(hidden, embeddings, torch.arange(9)[None], attend, wanted=wanted))
            follow = cache.attend_from(9, None)
            outputs.append(head(hidden[:, :1], embeddings[:, :1], torch.tensor([[9]]), follow))
    torch.testing.assert_close(outputs[2], outputs[0][:, -1:])
    torch.testing.assert_close(outputs[3], outputs[1])  # what was kept is the same
