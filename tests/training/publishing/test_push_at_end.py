"""`push_to_hub` in a training config: the folder of the artefact, nothing else, and a refusal that loses nothing."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from publishing import find_faults
from tests.targets import Architecture
from tests.tokenizers import ON_ONE_LINE, templated
from tests.trainers.heads import config, fresh, texts
from tests.training.publishing.artefacts import snapshot
from transformers_resps import AutoPolicy, DraftHead
from transformers_resps.data import prompt_fingerprint, read_training_prompts
from transformers_resps.hub.upload import Destination, upload
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.trainers import DraftHeadTrainer


TRAINING = Path(__file__).parents[3] / "training"
REPO = "tester/mine"
WORDS = ("fghi", "gh", "hifgh", "ifgf", "jklm", "nopqr")


def trainer(folder, **overrides) -> DraftHeadTrainer:
    target, head = fresh()
    args = config(folder, push_to_hub=True, hub_model_id=REPO, **overrides)
    return DraftHeadTrainer(head, args, texts(), target=target)


def test_a_checkpoint_pushes_the_head_and_no_pickle_nor_what_an_earlier_run_left(hub, tmp_path):
    one = trainer(tmp_path, max_steps=3)
    one.artefact_folder.mkdir(parents=True)
    (one.artefact_folder / "recipe.yaml").write_text("# python training/train_head.py /home/alice/data\n")
    one.train()
    pushed = hub.repositories[REPO].files
    assert set(pushed) == {".gitattributes", "config.json", "model.safetensors"}
    assert pushed["model.safetensors"] == (tmp_path / "head" / "model.safetensors").read_bytes()
    assert DraftHead.from_pretrained(REPO).fc.weight.dtype == torch.bfloat16


def test_a_checkpoint_of_a_head_goes_to_the_hub_in_its_targets_precision_and_without_the_rest(hub, tmp_path):
    one = trainer(tmp_path, max_steps=6, hub_strategy="end")
    one.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "training_args.bin").is_file()
    head = DraftHead.from_pretrained(checkpoint, target=one.target.model.bfloat16())
    head.push_to_hub("tester/early")
    files = set(hub.repositories["tester/early"].files)
    assert files == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert DraftHead.from_pretrained("tester/early").dtype == torch.bfloat16


def test_a_head_that_was_trained_in_python_lacks_a_card_and_a_benchmark_only(tmp_path):
    target, head = fresh()
    one = DraftHeadTrainer(head, config(tmp_path, max_steps=3), texts(), texts(1), target=target)
    one.train()
    one.evaluate()
    faults = find_faults(one.artefact_folder, "head")
    assert [fault.split(".")[0] for fault in faults[:2]] == ["README", "results"]
    assert all("recipe.yaml" in fault for fault in faults[2:]) and "lacks license" in faults[-1], faults


def test_at_the_end_alone_if_asked(hub, tmp_path):
    one = trainer(tmp_path, max_steps=3, hub_strategy="end")
    one.train()
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    assert one.push_to_hub().startswith(hub.endpoint)
    pushed = hub.repositories[REPO].files
    assert "model.safetensors" in pushed and f'DraftHead.from_pretrained("{REPO}"' in pushed["README.md"].decode()
    pushed["README.md"] = b"of the owner"
    one.push_to_hub()
    assert hub.repositories[REPO].files["README.md"] == b"of the owner"


def test_a_hub_that_fails_in_the_middle_does_not_stop_the_training_but_the_end_is_told(hub, tmp_path, caplog):
    hub.fault("/commit/", 403, times=99)
    one = trainer(tmp_path, max_steps=6)
    one.train()
    assert one.state.global_step == 6 and "Step 3 was not pushed" in caplog.text
    with pytest.raises(OSError, match="whether the token may write there"):
        one.push_to_hub()
    assert DraftHead.from_pretrained(tmp_path / "head") is not None


def test_a_wrong_token_is_told_before_the_training(hub, tmp_path):
    with pytest.raises(OSError, match="hf auth login"):
        trainer(tmp_path, hub_token="hf_wrong")


def test_a_repository_with_measurements_is_refused_before_the_training(hub, tmp_path):
    upload({"results.json": b"{}"}, Destination(REPO), "Publish")
    with pytest.raises(FileExistsError, match=r"results.json of other weights"):
        trainer(tmp_path)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A tiny target with a head, prompts and answers, in the working directory."""
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path / "cache"))
    target = Architecture("llama").build("sdpa").float()
    target.save_pretrained(tmp_path / "target")
    DraftHead.from_target(target, draft_vocab_size=12).save_pretrained(tmp_path / "given")
    templated(ON_ONE_LINE).save_pretrained(tmp_path / "target")
    rows = [{"prompt_id": word, "prompt": word, "completion": 3 * word} for word in WORDS]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


CARD = """
card:
  target: maker/tiny
  head: maker/tiny-head
  license: mit
  target_license: mit
  languages: [en]
  data: [{name: Words, license: mit, what: made up}]
push_to_hub: true
hub_model_id: tester/mine
hub_strategy: end
use_cpu: true
disable_tqdm: true
report_to: none
output_dir: run
"""


def train(script: str, settings: str, monkeypatch, card: str = CARD) -> None:
    Path("config.yaml").write_text(settings + card)
    monkeypatch.setattr(sys, "argv", [f"training/{script}", "--config", "config.yaml"])
    runpy.run_path(str(TRAINING / script), run_name="script")["main"]()


def test_the_head_script_ends_with_a_folder_that_lacks_the_benchmark_alone(hub, desk, monkeypatch):
    settings = (
        "target: target\ndatasets: [answers.jsonl]\ndraft_vocab_size: 12\nmax_length: 128\neval_share: 0.5\n"
        "target_init_kwargs: {dtype: float32}\n"
        "ttt_steps: 2\nbf16: false\nmax_steps: 2\ntokens_per_batch: 64\nsave_steps: 2\ntau_texts: 1\n"
    )
    trains = DraftHeadTrainer.train

    def trains_while_somebody_edits(self, **how):
        Path("config.yaml").write_text("edited: true\n")
        return trains(self, **how)

    monkeypatch.setattr(DraftHeadTrainer, "train", trains_while_somebody_edits)
    train("train_head.py", settings, monkeypatch)
    folder = desk / "run" / "head"
    pushed = {name: content for name, content in hub.repositories[REPO].files.items() if name != ".gitattributes"}
    assert pushed == snapshot(folder)
    assert pushed["recipe.yaml"].decode().endswith(settings + CARD)  # as it was begun
    card = pushed["README.md"].decode()
    assert f'DraftHead.from_pretrained("{REPO}"' in card
    assert "base_model: maker/tiny\n" in card and "Not measured yet" in card and "2 steps" in card
    assert [fault.split()[0] for fault in find_faults(folder, REPO)] == ["results.json"]
    assert read_training_prompts(folder) == set(map(prompt_fingerprint, WORDS))


def test_the_policy_script_likewise(hub, desk, monkeypatch):
    settings = (
        "target: target\nhead: given\ndataset: answers.jsonl\ntarget_dtype: float32\nmax_completion_length: 12\n"
        "max_steps: 4\ndrop_hopeless: false\n"
    )
    train("train_policy.py", settings, monkeypatch)
    folder = desk / "run" / "policy"
    pushed = {name: content for name, content in hub.repositories[REPO].files.items() if name != ".gitattributes"}
    assert pushed == snapshot(folder)
    assert AutoPolicy.from_pretrained(REPO).to_config() == AutoPolicy.from_pretrained(folder).to_config()
    assert [fault.split()[0] for fault in find_faults(folder, REPO)] == ["results.json"]
    seen = read_training_prompts(folder)
    assert seen < set(map(prompt_fingerprint, WORDS)) and len(seen) == len(WORDS) - 1  # one is for the final figure


@pytest.mark.parametrize(
    ("script", "settings"),
    [("train_head.py", "datasets: [nothing]\n"), ("train_policy.py", "head: nobody\ndataset: nothing\n")],
)
def test_what_cannot_be_published_is_told_before_anything_is_loaded(tmp_path, monkeypatch, script, settings):
    monkeypatch.chdir(tmp_path)
    private = f"target: /home/alice/target\n{settings}"
    with pytest.raises(ValueError, match=r"(?s)not be published:.*/home/alice/target.*without `push_to_hub`"):
        train(script, private, monkeypatch)
    with pytest.raises(ValueError, match=r"The `card` of the recipe .*`languages` is 'en'"):
        train(script, f"target: nowhere\n{settings}", monkeypatch, CARD.replace("[en]", "en"))
    here = CARD.replace("push_to_hub: true", "push_to_hub: false")
    with pytest.raises(OSError, match="/home/alice/target|nothing"):  # and only what is published must be presentable
        train(script, private, monkeypatch, here)


def test_no_path_of_this_machine_is_saved_with_a_head_or_a_policy(tmp_path, monkeypatch):
    target, head = fresh()
    for place in (tmp_path / "target", tmp_path / "given"):
        place.mkdir()
    head.config.target |= {"name_or_path": str(tmp_path / "target")}
    head.save_pretrained(tmp_path / "head")
    given = {"name_or_path": str(tmp_path / "given")}
    policy = ReSpSPolicy(ReSpSConfig(9, target=head.config.target, head=given))
    policy.save_pretrained(tmp_path / "policy")
    BaselineGuard(policy).save_pretrained(tmp_path / "guarded")
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("head", "policy", "guarded")]
    assert [config["target"]["name_or_path"] for config in (*told[:2], told[2]["policy"])] == ["target"] * 3
    assert told[1]["head"]["name_or_path"] == "given"
    assert str(tmp_path) not in json.dumps(told)
    assert head.config.target["name_or_path"] == policy.config.target["name_or_path"] == str(tmp_path / "target")
