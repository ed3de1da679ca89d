"""A trainer of heads reads conversations about images as TRL's `SFTTrainer` does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import ProcessorMixin

from tests.image_processors import image_processor, image_prompt, image_target, parts, picture
from tests.multimodal_targets import IMAGE, START
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer, templated, turns
from tests.trainers.heads import bits, config
from tests.trainers.test_head_trainer_resuming import Stop
from transformers_resps import DraftHead, attach
from transformers_resps.data import prompt_fingerprint, read_training_prompts
from transformers_resps.trainers import DraftHeadTrainer


def talks(count: int = 10) -> Dataset:
    """Every third has no image; all say the same, so that only images tell them apart."""
    texts = turns("defg", "ghghkl")
    rows = [
        {"messages": parts(texts, images=int(index % 3 > 0)), "images": [picture(index)] * int(index % 3 > 0)}
        for index in range(count)
    ]
    return Dataset.from_list(rows)


def trainer(folder: Path, name: str = "gemma3", head: Any = None, rows: Any = None, **settings: Any) -> Any:
    target = image_target(name)
    given = {
        "max_steps": 4,
        "save_steps": 2,
        "draft_vocab_size": START,
        "tau_texts": 2,
        "tokens_per_batch": 80,
    } | settings
    callbacks = given.pop("callbacks", None)
    return DraftHeadTrainer(
        head,
        config(folder, **given),
        talks() if rows is None else rows,
        talks(4),
        image_processor(name),
        callbacks,
        target=target,
    )


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_head_learns_from_images_and_drafts_about_them(name: str, tmp_path: Path) -> None:
    settings = {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 30}
    run = trainer(tmp_path, name, **settings)
    before, target = run.evaluate(), bits(run.target.model)
    run.train()
    after = run.evaluate()
    assert after["eval_loss_1"] < before["eval_loss_1"] and after["eval_tau"] >= 1
    assert all(torch.equal(value, target[key]) for key, value in bits(run.target.model).items())
    assert read_training_prompts(tmp_path / "head") == {prompt_fingerprint("defg")}
    model = attach(run.target.model)
    head = DraftHead.from_pretrained(tmp_path / "head", target=model)
    prompt = image_prompt(image_processor(name), text="defg")
    plain = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=head))


def test_each_image_is_read_with_its_own_text(tmp_path: Path) -> None:
    """The same text with other images has other features, in whatever batch it stands."""
    run = trainer(tmp_path)
    batches = [batch for batch in run.get_eval_dataloader() if "image_inputs" in batch]
    shown = [run.target.run(batch["input_ids"], image_inputs=batch["image_inputs"]).features for batch in batches]
    first, second = (
        (ids, features)
        for batch, found in zip(batches, shown, strict=True)
        for ids, features in zip(batch["input_ids"], found, strict=True)
        if IMAGE in ids
    )
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1], atol=1e-2)


@pytest.mark.parametrize("kind", ["plain", "cached", "streamed"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    found = []
    for folder, stops in (("whole", [None]), ("stopped", [2, None])):
        for stop in stops:
            cache = {"feature_cache_dir": str(tmp_path / "features")} if kind == "cached" else {}
            rows = talks().to_iterable_dataset() if kind == "streamed" else None
            torch.manual_seed(1)
            head = DraftHead.from_target(image_target(), START)
            run = trainer(tmp_path / folder, head=head, rows=rows, callbacks=[Stop(stop)] if stop else None, **cache)
            run.train(resume_from_checkpoint=len(stops) == 2 and stop is None)
        found.append(bits(run.model))
    whole, resumed = found
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_cached_features_of_one_text_with_two_images_are_two(tmp_path: Path) -> None:
    run = trainer(tmp_path, feature_cache_dir=str(tmp_path / "features"))
    texts = run._data.texts(run.train_dataset, run.target)
    first, second = texts[1], texts[2]
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.allclose(first["features"], second["features"], atol=1e-1)
    trainer(tmp_path, feature_cache_dir=str(tmp_path / "features"), rows=talks()).get_train_dataloader()
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_text_alone_trains_with_a_tokenizer_or_with_a_processor(tmp_path: Path) -> None:
    rows, losses = Dataset.from_list([{"messages": turns("defg", "ghghde")}] * 4), []
    for reads in (templated(), image_processor()):
        torch.manual_seed(1)
        target = image_target()
        head = DraftHead.from_target(target, START)
        run = DraftHeadTrainer(head, config(tmp_path, max_steps=1), rows, processing_class=reads, target=target)
        losses.append(run.train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("reads", [None, letter_tokenizer(), image_processor()], ids=["nothing", "tokenizer", "both"])
def test_images_without_a_processor_or_for_a_target_that_sees_none_are_refused(reads: Any, tmp_path: Path) -> None:
    sees_none = Architecture("llama").build("sdpa").float()
    target = sees_none if isinstance(reads, ProcessorMixin) else image_target()
    with pytest.raises(ValueError, match="`train_dataset` has images, but the target reads none, or .* no processor"):
        DraftHeadTrainer(None, config(tmp_path), talks(), processing_class=reads, target=target)


def test_the_processor_lies_where_the_target_came_from(tmp_path: Path) -> None:
    for part in (image_target(), image_processor()):
        part.save_pretrained(tmp_path / "target")
    args = config(tmp_path / "run", max_steps=1, draft_vocab_size=START)
    DraftHeadTrainer(None, args, talks(), target=str(tmp_path / "target")).train()
    assert (tmp_path / "run" / "head" / "model.safetensors").is_file()
