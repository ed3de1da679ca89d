"""The doctor on answers about images: features before and after what DeepStack adds to the first layers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.image_processors import image_processor, image_prompt, image_target, parts, picture
from tests.multimodal_targets import IMAGE, START
from tests.tokenizers import turns
from tests.tools.diagnoses import diagnose
from transformers_resps import DraftHead, attach
from transformers_resps.tools import doctor
from transformers_resps.tools.cli import main
from transformers_resps.tools.doctor import LabelledText
from transformers_resps.verifying.forward import FeatureTap


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return image_target("qwen3_vl")


def answers(target: PreTrainedModel, count: int = 3) -> list[LabelledText]:
    found = []
    for seed in range(count):
        prompt = image_prompt(image_processor("qwen3_vl"), seed)
        text = target.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
        shown = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
        types = (text == IMAGE).long()[None]
        found.append(LabelledText(text, prompt["input_ids"].shape[1], shown | {"mm_token_type_ids": types}))
    return found


@torch.no_grad()
def test_what_deepstack_adds_is_all_that_differs_before_and_after_it(target: PreTrainedModel) -> None:
    prompt, layers, caught = image_prompt(image_processor("qwen3_vl")), [0, 1, 2, 3], {}
    for is_before in (False, True):
        with FeatureTap(target, layers, before_deepstack=is_before) as tap, tap.record() as features:
            target(**prompt)
        caught[is_before] = features.caught
    added = target.model.visual(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).deepstack_features
    is_image = prompt["input_ids"] == IMAGE
    for layer in layers:
        expected = caught[True][layer].clone()
        if 1 <= layer <= len(added):
            expected[is_image] += added[layer - 1]
        torch.testing.assert_close(caught[False][layer], expected)


def test_both_readings_of_deepstack_are_measured_on_images_and_one_on_text(target: PreTrainedModel) -> None:
    torch.manual_seed(1)
    head = DraftHead.from_target(target, START, feature_layers=[1, 2])
    shown = diagnose(target, head, answers(target))
    readings = {score.reading for score in shown.scores}
    assert {reading.before_deepstack for reading in readings} == {False, True}
    nats = {score.reading: score.log_prob for score in shown.scores}
    for reading, number in nats.items():
        flipped = type(reading)(reading.feature_layers, reading.rope_theta, reading.norm_before_residual, True)
        assert reading.before_deepstack or abs(number - nats[flipped]) > 1e-6
    assert shown.configured.reading.before_deepstack is False
    text = [LabelledText(answer.tokens[answer.tokens < START], 4) for answer in answers(target)]
    assert not any(score.reading.before_deepstack for score in diagnose(target, head, text).scores)


def test_a_head_reads_the_side_of_deepstack_that_its_config_names(target: PreTrainedModel, tmp_path: Path) -> None:
    DraftHead.from_target(target, START, feature_layers=[1, 2]).save_pretrained(tmp_path)
    model, prompt, reports = attach(target), image_prompt(image_processor("qwen3_vl")), []
    plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    for is_before in (False, True):
        head = DraftHead.from_pretrained(tmp_path, target=model, before_deepstack=is_before)
        seen: list[torch.Tensor] = []
        hook = head.fc.register_forward_hook(lambda module, given, output, seen=seen: seen.append(given[0]))
        assert torch.equal(plain, model.generate(**prompt, max_new_tokens=12, do_sample=False, assistant_model=head))
        hook.remove()
        reports.append(seen[0])
    assert not torch.allclose(*reports, atol=1e-3)
    with pytest.raises(ValueError, match="reads features before DeepStack adds to them, but other engines"):
        head.save_pretrained(tmp_path / "export", format="specforge")


def test_the_command_reads_answers_about_images_from_a_file(
    target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target.save_pretrained(tmp_path / "target")
    image_processor("qwen3_vl").tokenizer.save_pretrained(tmp_path / "target")
    DraftHead.from_target(target, START, feature_layers=[1, 2]).save_pretrained(tmp_path / "head")
    rows = []
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.png")
        talk = parts(turns("de", "fghghgh", "d", "e"), images=1)
        rows.append({"messages": talk, "images": [str(tmp_path / f"{seed}.png")]})
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # There is no processor of videos without torchvision, so none can be saved here
    monkeypatch.setattr(doctor, "load_processor", lambda target: image_processor("qwen3_vl"))
    command = ["doctor", str(tmp_path / "target"), str(tmp_path / "head"), "--dataset", str(tmp_path / "talks.jsonl")]
    assert main([*command, "--device", "cpu", "--answers", "3"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "1, 2 before DeepStack" in printed and "of 3 answers" in printed
