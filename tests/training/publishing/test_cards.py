"""What a card tells of its folder. Whole ones are those of `model_cards/`, which change with the template."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from benchmarking.provenance import config_sha256
from publishing import UnreadableArtefactError, find_faults, read_artefact, render_card
from publishing.release import local_name
from tests.training.publishing.artefacts import changed, head_folder, policy_folder
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, TreeShape
from transformers_resps.data import read_training_prompts
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tools.results import SAME_TEXT_INVARIANT


MODEL_CARDS = sorted(file.parent for file in (Path(__file__).parents[3] / "model_cards").glob("*/config.json"))


@pytest.mark.parametrize("make", [head_folder, policy_folder])
def test_the_metadata_puts_a_card_on_the_page_of_its_target(make, tmp_path):
    data = ModelCard.load(make(tmp_path / "made") / "README.md").data
    assert data.base_model == "maker/tiny-1M-Instruct" and data.library_name == "transformers-resps"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"eagle3", "speculative-decoding", "custom_generate", "arxiv:2503.01840", "arxiv:2601.12212"} < set(
        data.tags
    )
    assert ("draft-model" in data.tags) == (make is head_folder)


def test_a_card_of_bare_weights_says_what_was_not_measured_and_no_more(tmp_path):
    FixedPolicy(TreeShape(4, 2, 2)).save_pretrained(tmp_path)
    card = render_card(read_artefact(tmp_path), "me/mine")
    assert "Not measured yet" in card and 'AutoPolicy.from_pretrained("me/mine")' in card
    assert not [part for part in ("How it was made", "Licences", "held-out", "base_model") if part in card]


def test_the_card_of_a_guarded_policy_names_the_target_and_the_head_of_the_guarded_one(tmp_path):
    made_with = {"target": {"name_or_path": "maker/tiny"}, "head": {"name_or_path": "maker/tiny-head"}}
    BaselineGuard(ThroughputPolicy(**made_with)).save_pretrained(tmp_path)
    card = render_card(read_artefact(tmp_path), "me/mine")
    assert "base_model: maker/tiny\n" in card and 'DraftHead.from_pretrained("maker/tiny-head"' in card


def test_a_card_tells_what_was_measured_on_a_busy_machine_and_how_many_shapes_were_picked(tmp_path):
    folder = policy_folder(tmp_path)
    assert "--accept-noise" not in render_card(read_artefact(folder), "me/mine")
    changed(folder, results={"noise": {"accepted": True}, "plain_spread": 0.12}, metrics={"distinct_actions": 1})
    card = render_card(read_artefact(folder), "me/mine")
    assert "the machine may have been busy; the speed of plain decoding varied by 12%." in card
    assert "it picked 1 of its shapes" in card


def test_a_card_tells_equal_texts_in_both_modes(tmp_path):
    folder = head_folder(tmp_path / "head")
    assert SAME_TEXT_INVARIANT not in render_card(read_artefact(folder), "me/mine")
    rows = json.loads((folder / "results.json").read_text())["summaries"]["all"]
    rows += [row | {"method": f"{row['method']}, invariant"} for row in rows if row["measured"]]
    same = {"plain": 20, "tree 8/3/3": 9, "plain, invariant": 11, "tree 8/3/3, invariant": 10}
    changed(folder, results={"summaries": {"all": rows}, "same_text": same})
    changed(folder, results={"same_text_invariant": {"tree 8/3/3, invariant": 20}})
    card = render_card(read_artefact(folder), "me/mine")
    told = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in card.splitlines() if " of 20 |" in line}
    counts = {"plain": "20", "tree 8/3/3": "9", "plain, invariant": "11", "tree 8/3/3, invariant": "20"}
    assert told == {name: f"{count} of 20" for name, count in counts.items()} and SAME_TEXT_INVARIANT in card


def test_several_temperatures_are_told_apart(tmp_path):
    folder = head_folder(tmp_path / "head")
    results = json.loads((folder / "results.json").read_text())
    warm = [row | {"temperature": 1.0, "ratio": 1.2} for row in results["summaries"]["a"]]
    summaries = {name: rows + warm for name, rows in results["summaries"].items()}
    changed(folder, results={"summaries": summaries, "settings": results["settings"] | {"temperatures": [0.0, 1.0]}})
    card = render_card(read_artefact(folder), "me/mine")
    assert "| 1 | tree 8/3/3 | 29.0 | 1.20 |" in card and "| a | 1 | 1.20 (2.25) | *" not in card
    assert "| a | 1 | 1.20 (2.25) | 1.20 |" in card and "greedy and temperature 1" in card


def test_figures_of_another_release_are_not_told(tmp_path):
    folder = changed(head_folder(tmp_path / "head"), results={"schema_version": 1})
    assert "Not measured yet" in render_card(read_artefact(folder), "me/mine")
    assert [fault for fault in find_faults(folder, "head") if "schema 1" in fault]


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "llama"}'])
def test_a_folder_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnreadableArtefactError):
        read_artefact(tmp_path)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"data": [{"name": "Sums", "what": "questions"}]}, "`data` is .*`license`"),
        ({"data": ["Sums"]}, "`data` is .*each item"),
        ({"data": {"name": "Sums"}}, "`data` is "),
        ({"languages": "en"}, "`languages` is 'en', but must be a list of strings"),
        ({"languages": [False]}, "quote words that YAML reads as another type, such as 'no'"),
        ({"limits": "abc"}, "`limits` is 'abc'"),
        ({"limits": [""]}, "`limits` is "),
        ({"license": ["mit"]}, r"`license` is \['mit'\], but must be a string"),
        ({"licence": "mit", "limits": "abc"}, "`licence` is not a field of a card; `limits` is"),
        (["mit"], "must be a mapping"),
    ],
    ids=str,
)
def test_what_cannot_become_a_card_is_refused_when_it_is_read(tmp_path, card, words):
    FixedPolicy(TreeShape(4, 2, 2)).save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"card": card}))
    with pytest.raises(UnreadableArtefactError, match=f"The `card` of .*recipe.yaml .*{words}"):
        read_artefact(tmp_path)


def test_a_field_of_a_card_that_is_left_empty_is_left_out(tmp_path):
    FixedPolicy(TreeShape(4, 2, 2)).save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text("card:\n  license: mit\n  languages:\n  limits:\n  data:\n")
    assert "license: mit\n" in render_card(read_artefact(tmp_path), "me/mine")


@pytest.mark.parametrize("folder", MODEL_CARDS, ids=lambda folder: folder.name)
def test_every_folder_of_model_cards_loads_and_its_card_is_what_its_files_render_to(folder):
    artefact = read_artefact(folder)
    if not artefact.is_mtp:
        assert (AutoPolicy if artefact.is_policy else DraftHead).from_pretrained(folder) is not None
    assert (folder / "README.md").read_text() == render_card(artefact, local_name(folder))
    assert {"license", "target_license", "languages", "data"} <= set(artefact.said)
    assert read_training_prompts(folder)
    if artefact.results:
        assert config_sha256(folder) in artefact.results["config_sha256"].values()


@pytest.mark.parametrize("folder", MODEL_CARDS, ids=lambda folder: folder.name)
def test_a_folder_of_model_cards_is_small_enough_for_a_checkout(folder):
    sizes = {file.name: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    weights = {
        "smollm2-135m-instruct-head": 24,
        "smollm2-135m-instruct-mtp": 9,
        "qwen2.5-coder-0.5b-instruct-head": 48,
    }.get(folder.name, 3)
    assert sizes.pop("model.safetensors") <= weights * 2**20
    assert sum(sizes.values()) <= 2**19


def test_there_is_something_to_load():
    assert MODEL_CARDS
