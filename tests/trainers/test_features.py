"""Features of the target that are kept on disk."""

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests.multimodal_targets import TARGETS, MultimodalTarget
from tests.targets import Architecture
from tests.trainers.heads import config, fresh, texts
from transformers_resps.data import prepare_dataset
from transformers_resps.trainers import DraftHeadTrainer, FrozenTarget
from transformers_resps.trainers import features as feature_cache
from transformers_resps.trainers.features import CachedFeatures, TargetFeatures
from transformers_resps.verifying.forward import FeatureTap


def prepared(dataset):
    return prepare_dataset(dataset, "texts", None, max_length=64, vocab_size=64)


def test_cached_features_train_the_same_head_as_the_target_itself(tmp_path):
    losses = []
    for folder in (None, str(tmp_path / "features")):
        target, head = fresh()
        args = config(tmp_path / str(bool(folder)), max_steps=3, feature_cache_dir=folder, eval_strategy="epoch")
        trainer = DraftHeadTrainer(head, args, texts(), texts(2), target=target.double())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(list((tmp_path / "features").iterdir())) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # they are kept in bf16


def test_a_fine_tune_with_the_same_output_head_does_not_meet_the_features_of_its_base(tmp_path):
    """As a merged LoRA; nor does the same target in another dtype, which rounds otherwise."""
    target, head = fresh()
    frozen = FrozenTarget(target, head.config.feature_layers)
    base = CachedFeatures(prepared(texts(2)), tmp_path, frozen)[0]["features"]
    with torch.no_grad():
        target.model.layers[0].mlp.down_proj.weight += 0.1
    tuned = CachedFeatures(prepared(texts(2)), tmp_path, frozen)[0]["features"]
    assert not torch.equal(base, tuned) and len(list(tmp_path.iterdir())) == 2
    target.bfloat16()
    CachedFeatures(prepared(texts(2)), tmp_path, frozen)
    assert len(list(tmp_path.iterdir())) == 3


def test_other_predicted_tokens_of_the_same_texts_have_picks_of_their_own(tmp_path):
    """Picks are kept for predicted tokens alone."""
    target, head = fresh()
    frozen = FrozenTarget(target, head.config.feature_layers)
    few = texts(3)
    all_of_them = prepared(few.remove_columns("completion_mask"))
    CachedFeatures(prepared(few), tmp_path, frozen)
    again = CachedFeatures(all_of_them, tmp_path, frozen)
    assert torch.equal(again[0]["picks"], CachedFeatures(all_of_them, tmp_path / "new", frozen)[0]["picks"])


def test_the_cache_goes_on_from_whole_files_and_says_what_a_full_disk_needs(tmp_path, monkeypatch):
    target, head = fresh()
    frozen = FrozenTarget(target, head.config.feature_layers)
    examples = prepared(texts(130))

    def full(tensors, path):
        if len(list(tmp_path.glob("*.safetensors"))) == 2:
            raise OSError(28, "No space left on device")
        return save(tensors, path)

    save = feature_cache.save_file
    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(OSError, match="bytes per token"):
        CachedFeatures(examples, tmp_path, frozen)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    monkeypatch.setattr(feature_cache, "save_file", save)
    assert len(CachedFeatures(examples, tmp_path, frozen)) == 130
    assert len(list(tmp_path.iterdir())) == 3


def test_processes_that_fill_one_cache_write_different_files(tmp_path, monkeypatch):
    target, head = fresh()
    frozen, save, names = FrozenTarget(target, head.config.feature_layers), feature_cache.save_file, set()

    def note(tensors, path):
        names.add(path.name)
        save(tensors, path)

    monkeypatch.setattr(feature_cache, "save_file", note)
    for process in (7, 8):
        monkeypatch.setattr(feature_cache.os, "getpid", lambda process=process: process)
        CachedFeatures(prepared(texts(2)), tmp_path / str(process), frozen)
    assert len(names) == 2


def test_a_damaged_file_is_named_and_what_to_do(tmp_path):
    target = FrozenTarget(Architecture("llama").build("sdpa"), [1, 2])
    rows = prepared(Dataset.from_list([{"input_ids": [3, 4, 5, 6]}]))
    cached = CachedFeatures(rows, tmp_path, target)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name} is gone or damaged.*Delete it and start again"):
        cached[0]
    file.unlink()
    assert CachedFeatures(rows, tmp_path, target)[0]["picks"].shape == (4,)


# Features of texts with images are those that `generate` reads in its own prefill.
LAYERS = [1, 2, 3]
PALIGEMMA = "paligemma"  # reads whole prompts in both directions
LEFT_OUT = (PALIGEMMA, "mllama")  # the other's calls with images are refused


def read(kind: MultimodalTarget, frozen: FrozenTarget, *rows: str, seed: int = 0) -> TargetFeatures:
    """Rows padded on the right."""
    prompt = kind.prompt(*rows, seed=seed)
    pads = (prompt.pop("attention_mask") == 0).sum(1).tolist()
    for name in {"input_ids", kind.types} & prompt.keys():
        prompt[name] = torch.stack([row.roll(-pad) for row, pad in zip(prompt[name], pads, strict=True)])
    return frozen.run(prompt.pop("input_ids"), image_inputs=prompt)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind.model_type not in LEFT_OUT], ids=str)
def test_features_of_images_are_those_of_generate_in_padded_batches_too(kind: MultimodalTarget) -> None:
    target, row = kind.build(), f"..{kind.letter}......"
    with FeatureTap(target, LAYERS) as tap, tap.record() as caught:
        target.generate(**kind.prompt(row), max_new_tokens=1, do_sample=False)
    frozen = FrozenTarget(target, LAYERS)
    alone = read(kind, frozen, row)
    assert close(alone.features, caught.concatenated())
    assert not close(alone.features, read(kind, frozen, row, seed=1).features)
    batch = read(kind, frozen, row, "." * 20, f".......{kind.letter}...").features[0]
    assert close(alone.features[0], batch[: alone.features.shape[1]])
    assert torch.equal(alone.picks[0, -1], target.lm_head(alone.hidden[0, -1]).argmax())


def test_a_target_that_reads_answers_in_both_directions_is_refused() -> None:
    (kind,) = (kind for kind in TARGETS if kind.model_type == PALIGEMMA)
    with pytest.raises(ValueError, match="PaliGemma.* reads a whole text with images in both directions.*text alone"):
        read(kind, FrozenTarget(kind.build(), LAYERS), "..I....")
