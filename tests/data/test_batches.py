"""Prepared datasets as tensors, whole or streamed, in batches of a token budget."""

import torch
from datasets import Dataset

from tests.trainers.heads import texts
from transformers_resps.data import prepare_dataset
from transformers_resps.data.batches import IGNORED, PreparedTexts, StreamedBatches, TokenBudgetBatches, collate


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


def prepared(rows):
    return prepare_dataset(rows, "texts", None, max_length=64, vocab_size=64)


def test_a_text_is_learned_from_where_a_head_can_predict():
    (row,) = PreparedTexts(prepared(Dataset.from_list([{"input_ids": [3, 4, 5, 6]}])))
    assert row["input_ids"].tolist() == [3, 4, 5, 6]
    assert row["loss_mask"].tolist() == [False, False, True, True]


def test_some_texts_are_spread_over_all_lengths():
    held_out = PreparedTexts(prepared(texts(12)))
    lengths = [len(text["input_ids"]) for text in held_out.some(3)]
    assert lengths == [sorted(held_out.lengths)[place] for place in (0, 4, 8)]
    assert len(list(held_out.some(99))) == 12


def test_a_stream_is_cut_into_batches_of_the_budget_that_hold_every_text_once(monkeypatch):
    monkeypatch.setattr("transformers_resps.data.batches._STREAM_BUFFER", 10)
    whole = PreparedTexts(prepared(texts(25)))
    batches = list(StreamedBatches(prepared(texts(25).to_iterable_dataset()), 64))
    found = [tuple(text["input_ids"].tolist()) for batch in batches for text in batch]
    assert sorted(found) == sorted(tuple(whole[index]["input_ids"].tolist()) for index in range(25))
    assert set(found[:10]) == {tuple(whole[index]["input_ids"].tolist()) for index in range(10)}
    assert all(len(batch) * max(len(text["input_ids"]) for text in batch) <= 64 for batch in batches)
    assert len(batches) < 25 and torch.equal(batches[0][0]["input_ids"], batches[0][0]["input_ids"].long())
