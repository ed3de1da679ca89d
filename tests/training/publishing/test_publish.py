"""training/publish.py from a folder to the Hub and back."""

import json
import runpy
from pathlib import Path

import pytest

from publishing import write_run
from tests.training.publishing.artefacts import changed, policy_folder, snapshot
from transformers_resps import AutoPolicy, DraftHead


SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "training" / "publish.py"), run_name="publish")
REPO = "tester/head"


def publish(*arguments) -> int:
    return SCRIPT["main"]([str(argument) for argument in arguments])


def test_a_head_is_published_whole_in_one_commit_with_the_card_naming_the_repository(hub, folder):
    before = snapshot(folder)
    assert publish(folder, REPO, "--private") == 0
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.commits) == 2
    sent = {name: content for name, content in repository.files.items() if name != ".gitattributes"}
    assert snapshot(folder) == before
    assert set(sent) == {*before, "custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert {name for name in before if sent[name] != before[name]} == {"README.md"}
    assert sent["README.md"].decode() == before["README.md"].decode().replace('"head"', f'"{REPO}"')
    assert DraftHead.from_pretrained(REPO).config.draft_vocab_size == 48


def test_what_an_earlier_publication_left_goes_and_what_others_put_there_stays(hub, folder):
    assert publish(folder, REPO) == 0
    (folder / "speed_ratio.png").unlink()
    assert publish(folder, "--render") == 0
    repository = hub.repositories[REPO]
    by_hand = {"LICENSE": b"mit", "images/drawn.png": b"\x89"}
    repository.commit(repository.files | by_hand | {"custom_generate/old.py": b""})
    assert publish(folder, REPO) == 0
    assert set(repository.files) == {".gitattributes", *snapshot(folder), *by_hand}


def test_a_measured_repository_takes_no_weights_without_measurements(hub, folder):
    assert publish(folder, REPO) == 0
    before = dict(hub.repositories[REPO].files)
    head = DraftHead.from_pretrained(REPO)
    with pytest.raises(FileExistsError, match=r"holds metrics.json and results.json of other weights"):
        head.push_to_hub(REPO)
    assert hub.repositories[REPO].files == before
    head.push_to_hub("tester/other")


def test_a_policy_is_published_likewise(hub, tmp_path):
    assert publish(policy_folder(tmp_path / "policy"), "tester/policy") == 0
    assert AutoPolicy.from_pretrained("tester/policy").config.grid is not None


def test_a_dry_run_lists_what_would_go_and_asks_nobody(hub, folder, capsys):
    assert publish(folder, REPO, "--dry-run") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("model.safetensors", "README.md", "custom_generate/generate.py"))
    assert hub.requests == []


def test_a_faulty_folder_is_refused_before_anything_is_asked(hub, folder, capsys):
    changed(folder, results={"partial": True})
    for mode in ([], ["--dry-run"]):
        assert publish(folder, REPO, *mode) == 1
        assert "is partial" in capsys.readouterr().err
    assert hub.requests == []


def test_a_targets_folder_is_never_in_a_card_and_its_id_is_asked_for(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    config["target"]["name_or_path"] = "tiny-135m"
    (folder / "config.json").write_text(json.dumps(config))
    assert publish(folder, "--render") == 1
    assert "The target 'tiny-135m' is not a Hub id. Put `target: HUB_ID` under `card`" in capsys.readouterr().err
    write_run(folder, (folder / "recipe.yaml").read_text())
    assert "the card cannot say what to load. The target 'tiny-135m' is" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "tiny-135m" not in card and 'AutoModelForCausalLM.from_pretrained("TARGET"' in card and "None" not in card


def test_render_mends_the_card_and_adds_the_code(hub, folder):
    changed(folder, metrics={"held_out_texts": 51})
    assert publish(folder, REPO, "--dry-run") == 1
    assert publish(folder, "--render") == 0
    assert publish(folder, REPO, "--dry-run") == 0
    assert "51 held-out sequences" in (folder / "README.md").read_text()
    assert (folder / "custom_generate" / "generate.py").is_file()


def test_without_a_repository_there_is_nowhere_to_publish(folder):
    with pytest.raises(SystemExit):
        publish(folder)


@pytest.mark.parametrize("fault", ["PUT /large", "/commit/"])
def test_a_broken_upload_leaves_no_half_repository_and_can_be_run_again(hub, folder, pauses, capsys, fault):
    before = snapshot(folder)
    hub.fault(fault, "drop", times=99)
    assert publish(folder, REPO) == 2
    assert "Either all files were committed or none" in capsys.readouterr().err
    assert set(hub.repositories[REPO].files) == {".gitattributes"} and snapshot(folder) == before
    hub.faults.clear()
    assert publish(folder, REPO) == 0


def test_a_refusal_of_the_hub_is_told(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert publish(folder, REPO) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_a_policy_without_results_shows_its_head_s_and_takes_them_along_when_it_is_published(hub, tmp_path):
    folder = policy_folder(tmp_path / "policy")
    beside = tmp_path / "tiny-head"
    beside.mkdir()
    moved = ("speed_ratio.png", "results.json")
    kept = {name: (folder / name).read_bytes() for name in moved}
    (folder / moved[0]).rename(beside / moved[0])
    assert publish(folder, "--render") == 0
    assert (
        moved[0] not in (folder / "README.md").read_text()
    )  # its own results: a head that was measured in another run
    (folder / moved[1]).rename(beside / moved[1])
    assert publish(folder, "--render") == 0
    assert "](../tiny-head/speed_ratio.png)" in (folder / "README.md").read_text()
    assert publish(folder, "tester/policy") == 0
    sent = hub.repositories["tester/policy"].files
    assert {name: sent[name] for name in moved} == kept and "](speed_ratio.png)" in sent["README.md"].decode()
