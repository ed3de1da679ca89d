"""What a trainer of heads takes, as TRL's does, and what it refuses before it loads or reads anything."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTTrainer

from tests.conftest import build_target
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from tests.trainers.heads import config, fresh, texts
from transformers_resps import DraftHead
from transformers_resps.trainers import DraftHeadTrainer
from transformers_resps.verifying.prepacking import PrepackedLinear


ROW = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}
SHARED = ["model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "peft_config"]


def test_the_signature_is_that_of_trls_trainer_and_the_target() -> None:
    ours, theirs = (inspect.signature(one.__init__).parameters for one in (DraftHeadTrainer, SFTTrainer))
    assert [name for name in ours if name in theirs and name not in ("self", "kwargs")] == SHARED
    assert [name for name in theirs if name in ours and name not in ("self", "kwargs")] == SHARED
    assert [ours[name].default for name in SHARED] == [theirs[name].default for name in SHARED]
    assert [name for name, one in ours.items() if one.kind is one.KEYWORD_ONLY] == ["target"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "`model` is a int, but must be a `DraftHead` or `BlockHead` or `MtpHead`. Pass"),
        ({"model": build_target()}, "`model` is a LlamaForCausalLM, .*Pass this model as `target`, and `None`"),
        (
            {"args": TrainingArguments("x", use_cpu=True)},
            "`args` is a TrainingArguments, but must be a `DraftHeadTrainingConfig`",
        ),
        ({"train_dataset": [ROW]}, "`train_dataset` is a list, but must be a `Dataset` or `IterableDataset`"),
        ({"eval_dataset": {"held out": [ROW]}}, r"`eval_dataset\['held out'\]` is a list, but must be a `Dataset`"),
        ({"eval_dataset": Dataset.from_list([])}, "`eval_dataset` is empty. Pass a split that has rows"),
        ({"target": 3}, "`target` is a int, but must be a `PreTrainedModel`"),
        ({"processing_class": 3}, "`processing_class` is a int, but must be a `PreTrainedTokenizerBase`"),
        ({"model": None, "train_dataset": None}, "`model` and `train_dataset` are missing"),
        ({"model": None, "peft_config": LoraConfig()}, "adapters need a head to start from.*Pass the head as `model`"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    target, head = fresh()
    given: dict[str, Any] = {"model": head, "target": target, "args": config(tmp_path), "train_dataset": texts()}
    with pytest.raises(ValueError, match=message):
        DraftHeadTrainer(**given | changes)


def test_a_model_where_a_head_belongs_is_named(tmp_path: Path) -> None:
    target, _ = fresh()
    target.save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match=r"`model` is .*which holds no draft head.*with `DraftHeadTrainer\(None"):
        DraftHeadTrainer(str(tmp_path / "target"), config(tmp_path), texts(), target=target)


def test_a_checkpoint_of_another_head_is_named(tmp_path: Path) -> None:
    for size in (48, 40):
        target, head = fresh(size)
        trainer = DraftHeadTrainer(head, config(tmp_path, max_steps=3), texts(), target=target)
        if size == 48:
            trainer.train()
    with pytest.raises(ValueError, match="holds a head with draft_vocab_size 48, but this run trains one with 40"):
        trainer.train(resume_from_checkpoint=True)


def test_adapters_of_all_linear_layers_are_saved_and_resumed(tmp_path: Path) -> None:
    for resume in (None, True):
        target, head = fresh()
        adapters = LoraConfig(r=2, target_modules="all-linear")
        args = config(tmp_path, max_steps=3 if resume is None else 6)
        DraftHeadTrainer(head, args, texts(), peft_config=adapters, target=target).train(resume_from_checkpoint=resume)
    assert DraftHead.from_pretrained(tmp_path / "head", target=target) is not None


def test_a_dict_of_splits_is_refused_naming_them(tmp_path: Path) -> None:
    target, head = fresh()
    both = DatasetDict({"learn": texts(), "test": texts(3)})
    with pytest.raises(ValueError, match=r"a DatasetDict of the splits \['learn', 'test'\].*`dataset\['learn'\]`"):
        DraftHeadTrainer(head, config(tmp_path), both, target=target)


def test_an_iterable_dataset_needs_max_steps_and_is_not_cached(tmp_path: Path) -> None:
    target, head = fresh()
    rows = texts().to_iterable_dataset()
    with pytest.raises(ValueError, match="an `IterableDataset`, whose length is not known.*Set `max_steps`"):
        DraftHeadTrainer(head, config(tmp_path, max_steps=-1), rows, target=target)
    with pytest.raises(ValueError, match="`feature_cache_dir` is set, but features of an `IterableDataset`"):
        DraftHeadTrainer(head, config(tmp_path, feature_cache_dir=str(tmp_path)), rows, target=target)


def test_a_target_that_is_a_head_is_refused(tmp_path: Path) -> None:
    target, head = fresh()
    for layout in ("resps", "specforge", "speculators"):
        head.save_pretrained(tmp_path / layout, format=layout)
        with pytest.raises(ValueError, match="which is a draft head. Pass the model that the head drafts for"):
            DraftHeadTrainer(None, config(tmp_path), texts(), target=str(tmp_path / layout))
    with pytest.raises(ValueError, match="`target` is a `DraftHead`, but must be the model"):
        DraftHeadTrainer(head, config(tmp_path), texts(), target=head)


def test_a_tokenizer_of_another_model_with_as_many_tokens_is_refused(tmp_path: Path) -> None:
    target = Architecture("llama").build("sdpa").float()
    target.save_pretrained(tmp_path / "target")
    letter_tokenizer().save_pretrained(tmp_path / "target")
    other = letter_tokenizer(first="b")
    rows = Dataset.from_list([{"text": "defghi"}])
    args = config(tmp_path, draft_vocab_size=0)
    with pytest.raises(ValueError, match="`processing_class` .* is another model's tokenizer: it gives other ids"):
        DraftHeadTrainer(None, args, rows, processing_class=other, target=str(tmp_path / "target"))
    trainer = DraftHeadTrainer(None, args, rows, processing_class=letter_tokenizer(), target=str(tmp_path / "target"))
    assert trainer.train_dataset[0]["input_ids"] == [3, 4, 5, 6, 7, 8]


def test_a_tokenizer_that_does_not_know_the_targets_end_is_refused_where_its_own_is_not_at_hand(
    tmp_path: Path,
) -> None:
    target, head = fresh()
    assert target.config.eos_token_id == 2
    other = letter_tokenizer(first="b")
    assert other.eos_token_id == 1
    with pytest.raises(ValueError, match="is another model's tokenizer"):
        DraftHeadTrainer(head, config(tmp_path), texts(), processing_class=other, target=target)
    DraftHeadTrainer(head, config(tmp_path), texts(), processing_class=letter_tokenizer(), target=target)


def test_strings_load_what_they_name(tmp_path: Path) -> None:
    target, head = fresh()
    target.save_pretrained(tmp_path / "target")
    head.save_pretrained(tmp_path / "head")
    args = config(tmp_path, model_init_kwargs={"default_tree": [4, 2, 2]}, target_init_kwargs={"dtype": "float64"})
    trainer = DraftHeadTrainer(str(tmp_path / "head"), args, texts(), target=str(tmp_path / "target"))
    assert trainer.target.model.dtype == torch.float64 and trainer.head.dtype == torch.float32
    assert trainer.head.config.default_tree == [4, 2, 2]
    assert torch.equal(trainer.head.fc.weight, head.fc.weight)


def test_a_run_without_settings_writes_beside_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, head = fresh()
    target.config.max_position_embeddings = 2048
    target.config.name_or_path = "someone/model"
    assert DraftHeadTrainer(head, target=target).args.output_dir == "model-head"


def test_a_new_head_can_propose_what_the_answers_use_most(tmp_path: Path) -> None:
    """By hand: of the answers' tokens 9 (three times), 7 (twice) and 4, the first two, and the target's end, 2."""
    target, _ = fresh()
    rows = [{"input_ids": [5, 5, 5, 9, 9, 7], "completion_mask": [0, 0, 0, 1, 1, 1]}]
    rows += [{"input_ids": [5, 5, 5, 9, 7, 4], "completion_mask": [0, 0, 0, 1, 1, 1]}]
    args = config(tmp_path, draft_vocab_size=3)
    trainer = DraftHeadTrainer(None, args, Dataset.from_list(rows), target=target)
    assert trainer.head.draft_token_ids.tolist() == [2, 7, 9]
    assert trainer.draft_vocabulary().coverage == pytest.approx(5 / 6)
    everything = DraftHeadTrainer(None, config(tmp_path, draft_vocab_size=0), texts(), target=target)
    assert everything.head.config.draft_vocab_size is None
    assert isinstance(everything.head, DraftHead)


def test_the_callers_target_keeps_its_layers_and_one_that_was_named_is_prepacked(tmp_path: Path) -> None:
    target, head = fresh()
    DraftHeadTrainer(head, config(tmp_path), texts(), target=target)
    assert not any(isinstance(module, PrepackedLinear) for module in target.modules())
    target.save_pretrained(tmp_path / "target")
    named = DraftHeadTrainer(head, config(tmp_path), texts(), target=str(tmp_path / "target"))
    assert any(isinstance(module, PrepackedLinear) for module in named.target.model.modules())
