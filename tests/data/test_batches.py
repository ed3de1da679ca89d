import torch

from transformers_resps.data.batches import IGNORED, TokenBudgetBatches, collate


def test_labels_hold_the_predicted_tokens_and_padding_has_none():
    rows = [
        {"input_ids": torch.tensor([5, 6, 7]), "loss_mask": torch.tensor([False, False, True])},
        {"input_ids": torch.tensor([8, 9, 1, 2]), "loss_mask": torch.tensor([False, False, False, True])},
    ]
    batch = collate(rows)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, IGNORED, IGNORED, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 1, 2]]


def test_batches_keep_to_the_budget_and_hold_every_text_once_per_epoch():
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = TokenBudgetBatches(lengths, 128, seed=3)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        order = list(batches)
        assert len(order) == len(batches)
        assert sorted(i for batch in order for i in batch) == list(range(200))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 128 for batch in order)
        orders.append(order)
    assert orders[0] != orders[1]
