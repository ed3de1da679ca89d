"""What a run that pushes its result must say before it starts: a recipe that lacks one thing is refused for it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from publishing import check_publishable
from tests.training.publishing import tiny
from transformers_resps.hub.upload import Destination, upload


CARD = tiny.CARD | {"data": [tiny.DATA | {"hub_id": "maker/letters"}]}


def check(folder: Path, card: Any, *, note: str = "", target: str = "maker/tiny", **how: Any) -> None:
    args = TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True, **{"push_to_hub": True, **how})
    check_publishable(yaml.safe_dump({"card": card}) + note, args, target)


@pytest.mark.parametrize("name", ["license", "target_license", "languages", "data"])
def test_a_card_that_lacks_a_field_is_refused(tmp_path: Path, name: str) -> None:
    lacking = {key: value for key, value in CARD.items() if key != name}
    with pytest.raises(
        ValueError, match=f"(?s)could not be published:.*`card` of the recipe lacks {name}. Add"
    ) as told:
        check(tmp_path, lacking)
    assert str(told.value).count("\n- ") == 1


@pytest.mark.parametrize("card", [None, {}])
def test_no_card_is_refused_with_all_that_it_needs(tmp_path: Path, card: Any) -> None:
    with pytest.raises(ValueError, match="lacks license, target_license, languages, data"):
        check(tmp_path, card)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"license": "Apache 2.0"}, "The license 'Apache 2.0' in the recipe is no id"),
        ({"target_license": "MIT"}, "The license 'MIT'"),
        ({"languages": ["English"]}, "The language 'English' in the recipe is no ISO 639 code"),
        ({"data": [CARD["data"][0] | {"hub_id": "https://hf.co/maker/letters"}]}, "is no id of a dataset"),
        ({"target": "my target"}, "The target 'my target' is not a Hub id"),
        ({"languages": "en"}, "`languages` is 'en', but must be a list"),
        ({"licence": "mit"}, "`licence` is not a field of a card"),
    ],
)
def test_a_value_that_the_hub_would_not_take_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(tmp_path, copy.deepcopy(CARD) | change)


def test_a_target_that_is_a_folder_needs_its_id_in_the_card(tmp_path: Path) -> None:
    unnamed = {key: value for key, value in CARD.items() if key != "target"}
    with pytest.raises(ValueError, match="The target 'work/target/smollm2' is not a Hub id. Put `target: HUB_ID`"):
        check(tmp_path, unnamed, target="work/target/smollm2")


def test_private_paths_and_a_bad_repository_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not be published") as told:
        check(tmp_path, CARD, note="# --datasets /home/alice/words.jsonl\n", hub_model_id="me/my head")
    assert "/home/alice/words.jsonl" in str(told.value) and "`hub_model_id` is 'me/my head'" in str(told.value)


def test_a_run_that_pushes_nothing_needs_no_card(tmp_path: Path) -> None:
    check(tmp_path, None, push_to_hub=False)


def test_the_repository_is_made_before_the_run_and_one_with_measurements_is_refused(hub: Any, tmp_path: Path) -> None:
    check(tmp_path, CARD, hub_model_id="tester/new", hub_private_repo=True)
    assert hub.repositories["tester/new"].private
    check(tmp_path, CARD)
    assert "tester/run" in hub.repositories, "by default the name of the output folder"
    upload({"results.json": b"{}"}, Destination("tester/old"), "Publish")
    with pytest.raises(FileExistsError, match=r"results.json of other weights"):
        check(tmp_path, CARD, hub_model_id="tester/old")
    with pytest.raises(OSError, match="hf auth login"):
        check(tmp_path, CARD, hub_model_id="tester/new", hub_token="hf_wrong")
