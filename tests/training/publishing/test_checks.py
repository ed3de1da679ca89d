"""What keeps a folder from being published; and that everything is told at once."""

import json
import pickle

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from publishing import find_faults, write_card, write_custom_generate
from publishing.checks import read_results
from publishing.release import check_folder, local_name
from tests.tokenizers import letter_tokenizer
from tests.training.publishing.artefacts import changed, complete, policy_folder
from transformers_resps import FixedPolicy, SuffixMemory, TreeShape


def faults(folder) -> list[str]:
    return find_faults(folder, local_name(folder))


def only(folder, *words: str) -> None:
    """Exactly one fault, with these words."""
    found = faults(folder)
    assert len(found) == 1 and all(word in found[0] for word in words), found


def test_complete_folders_have_no_faults(folder, tmp_path):
    assert faults(folder) == faults(policy_folder(tmp_path / "policy")) == []


def test_results_of_an_old_schema_are_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"schema_version": 2, "x": 1}')
    assert read_results(file) == {"schema_version": 2, "x": 1}
    for text, found in (('{"schema_version": 1}', "schema 1"), ("{}", "schema None"), ("[", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ValueError, match=found):
            read_results(file)


def test_a_policy_without_weights_is_told_by_its_config(tmp_path):
    FixedPolicy(TreeShape(4, 2, 2)).save_pretrained(tmp_path / "fixed")
    recipe = {"card": {"license": "mit", "target_license": "mit", "languages": ["en"], "data": [
        {"name": "none", "license": "none", "what": "chosen by hand"}], "target": "maker/tiny"}}  # fmt: skip
    folder = complete(tmp_path / "fixed", {"training": {"minutes": 0}}, recipe, "fixed", ["a"])
    assert faults(folder) == []
    changed(folder, config={"shape": [5, 2, 2, 0]})
    write_card(folder)
    assert ["other weights" in faults(folder)[0], "other config" in faults(folder)[1]] == [True, True]


@pytest.mark.parametrize("name", ["README.md", "results.json", "metrics.json", "recipe.yaml", "model.safetensors"])
def test_a_missing_file_is_named_with_where_it_comes_from(folder, name):
    (folder / name).unlink()
    assert [fault for fault in faults(folder) if fault.startswith(f"{name} is missing")]


def test_weights_whose_training_prompts_nobody_kept_are_refused(folder):
    prompts = folder / "training_prompts.json"
    prompts.write_text("[]")
    only(folder, "training_prompts.json is not what `write_training_prompts` writes")
    prompts.unlink()
    only(folder, "training_prompts.json is missing", "measure on prompts", "training script")


@pytest.mark.parametrize("name", ["memory.safetensors", "memory", "notes.md"])
def test_a_folder_that_holds_a_memory_is_refused_whatever_the_file_is_called(folder, name):
    memory = SuffixMemory()
    memory.add([[1, 2, 3]])
    memory.save(folder / name, letter_tokenizer())
    only(folder, f"{name} is a memory, which holds users' texts")


def test_results_of_other_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"fc.weight": tensors["fc.weight"] + 1}, folder / "model.safetensors")
    only(folder, "results.json", "other weights", "training/benchmark.py")


def test_weights_measured_under_another_config_are_refused(folder):
    first, *others = json.loads((folder / "config.json").read_text())["feature_layers"]
    changed(folder, config={"feature_layers": [first - 1, *others]})
    only(folder, "results.json", "other config", "training/benchmark.py")
    changed(folder, config={"feature_layers": [first, *others]})
    assert faults(folder) == []
    changed(folder, config={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    only(folder, "results.json", "other config", "training/benchmark.py")


def test_a_policy_measured_with_another_grid_is_refused(tmp_path):
    folder = policy_folder(tmp_path / "policy")
    plain, _ = json.loads((folder / "config.json").read_text())["grid"]
    changed(folder, config={"grid": [plain, [5, 2, 2, 0]]})
    only(folder, "other config")


def test_results_from_before_configs_were_hashed_are_refused(folder):
    results = json.loads((folder / "results.json").read_text())
    del results["config_sha256"]
    (folder / "results.json").write_text(json.dumps(results))
    only(folder, "other config")


def test_the_best_measured_tree_may_become_the_default(folder):
    changed(folder, config={"default_tree": [4, 2, 2]})
    write_card(folder)
    assert faults(folder) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partial": True}, "partial"),
        ({"noise": {"accepted": True}}, "busy"),
        ({"unexplained": ["tree 8/3/3, a/3"]}, "beyond rounding"),
    ],
)
def test_results_not_worth_publishing_are_refused(folder, change, words):
    write_card(changed(folder, results=change))
    only(folder, "results.json", words)


def test_a_card_edited_by_hand_is_refused(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("1.45 times", "2.45 times"))
    only(folder, "README.md does not match the other files", "--render")


def test_a_figure_changed_without_its_card_is_refused(folder):
    only(changed(folder, metrics={"held_out_texts": 51}), "README.md does not match the other files")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "training_args.bin", "notes.pkl", "modeling.py", "run.sh", ".env", "extra/more.json"]
)
def test_pickles_code_and_strangers_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    only(folder, name, "no code and no pickle")


@pytest.mark.parametrize("name", ["model-2.safetensors", "plot.png"])
def test_a_pickle_under_another_name_is_refused(folder, name):
    torch.save({"a": 1}, folder / name)
    found = faults(folder)
    assert any(name in fault and ("whole safetensors" in fault or "not a PNG" in fault) for fault in found), found


def test_a_program_and_a_link_are_refused(folder, tmp_path):
    (folder / "metrics.json").chmod(0o755)
    (folder / "secrets.json").symlink_to(tmp_path / "anywhere")
    assert ["marked as executable" in faults(folder)[0], "is a link" in faults(folder)[1]] == [True, True]


def test_custom_generate_is_ours_or_refused(folder):
    write_custom_generate(folder)
    assert faults(folder) == []
    with (folder / "custom_generate" / "generate.py").open("a") as file:
        file.write("\nimport os\n")
    only(folder, "custom_generate/generate.py", "did not write")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/data/answers.jsonl", "/home/alice/data/answers.jsonl"),
        ("--output=/tmp/run/1", "/tmp/run/1"),
        ("~/heads/mine", "~/heads/mine"),
        ("C:\\Users\\alice\\heads", "C:\\Users\\alice\\heads"),
        ("file:///srv/heads/x", "file:///srv/heads/x"),
    ],
)
def test_paths_of_the_machine_are_refused_in_json_and_yaml(folder, text, shown):
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"# trained on {text}\n")
    only(folder, "recipe.yaml", shown, "paths of your machine")


@pytest.mark.parametrize("text", ["tokens/s", "maker/talk", "https://huggingface.co/maker/talk", "1/2", "work/run"])
def test_what_only_looks_like_a_path_passes(folder, text):
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"# see {text}\n")
    assert faults(folder) == []


def test_a_login_name_is_refused_but_not_as_the_owner_of_a_repository(folder, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    recipe = folder / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before + "# alice/head\n")
    assert faults(folder) == []
    recipe.write_text(before + "# on the machine of alice\n")
    only(folder, "login name 'alice'")


def test_too_large_a_file_is_refused(folder):
    with (folder / "speed_ratio.png").open("r+b") as file:
        file.truncate(11 << 20)
    only(folder, "speed_ratio.png", "11,534,336 bytes", "10,485,760")


def test_a_recipe_that_says_nothing_of_licences_and_data_is_refused(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["card"]["target_license"], recipe["card"]["data"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_card(folder)
    only(folder, "target_license, data")


def test_a_target_that_is_a_folder_here_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work" / "target").mkdir(parents=True)
    target = json.loads((folder / "config.json").read_text())["target"] | {"name_or_path": "work/target"}
    changed(folder, config={"target": target})
    write_card(folder)
    only(folder, "'work/target'", "not a Hub id")


def test_weights_that_do_not_load_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, folder / "model.safetensors")
    only(folder, "fc.weight")


def test_everything_wrong_is_told_at_once_with_what_to_do(folder):
    (folder / "metrics.json").unlink()
    (folder / "run.sh").write_text("rm -r *")
    changed(folder, results={"partial": True})
    with pytest.raises(ValueError, match="cannot be published") as caught:
        check_folder(folder, "me/head")
    listed = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert len(listed) == 4  # and the card no longer fits
    assert str(caught.value).endswith("Fix these, then publish again.")
