"""The script that trains heads, on tiny targets and letters."""

import dataclasses
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import generate_dataset
import pytest
import torch
from transformers import AutoModelForCausalLM

from runs.hours import RunHours
from tests.targets import Architecture
from tests.tokenizers import ON_ONE_LINE, templated
from transformers_resps import DraftHead, attach
from transformers_resps.data import Conversation, prompt_fingerprint, read_training_prompts, write_training_prompts
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig


ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "training" / "train_head.py"), run_name="train_head")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny target, and 60 answered questions in two files."""
    torch.manual_seed(1)
    Architecture("llama").build("sdpa").float().save_pretrained(tmp_path / "target")
    templated(ON_ONE_LINE).save_pretrained(tmp_path / "target")
    letters = "defgjklmnopqrs"
    rows = [{"prompt": letters[i % 14] + letters[i // 14] + "ef", "completion": letters[i % 5 : 9]} for i in range(60)]
    for name, part in (("first", rows[:40]), ("second", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *datasets: str, **options: Any) -> None:
    given = {"target": folder / "target", "output_dir": folder / "run", "draft_vocab_size": 12, "eval_share": 0.2}
    given |= {"max_length": 64, "tokens_per_batch": 64, "max_steps": 2, "save_steps": 2, "ttt_steps": 2, "bf16": False}
    given |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = [part for name, value in (given | options).items() for part in (f"--{name}", *str(value).split())]
    files = [str(folder / f"{name}.jsonl") for name in datasets or ("first",)]
    asked = [] if "prompts" in options else ["--datasets", *files]
    monkeypatch.setattr(sys, "argv", ["train_head.py", *asked, *arguments])
    SCRIPT["main"]()


@pytest.mark.parametrize("layout", ["resps", "specforge", "speculators"])
def test_a_warm_start_keeps_what_the_head_is_and_a_checkpoint_wins_over_it(
    layout: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    ids = torch.tensor([2, 3, 4, 5, 9, 11])
    torch.manual_seed(7)
    given = DraftHead.from_target(target, draft_token_ids=ids, feature_layers=[1, 3], fc_norm=True)
    given.save_pretrained(folder / "given", format=layout)
    write_training_prompts(folder / "given", ["before"])
    options = {"head": folder / "given", "learning_rate": 1e-4, "target_name": "us/ours"}
    run(folder, monkeypatch, **options)
    printed = capsys.readouterr().out
    assert f"starting from {folder / 'given'}" in printed and "6 tokens cover" in printed
    assert f'head = AutoDraftHead.from_pretrained("{folder / "run" / "head"}", target=model)' in printed
    ours = DraftHead.from_pretrained(folder / "run" / "checkpoint-2", target=target)
    assert ours.draft_token_ids.tolist() == ids.tolist()
    assert ours.config.feature_layers == [1, 3] and ours.config.fc_norm
    assert ours.config.target is not None and ours.config.target["name_or_path"] == "us/ours"
    assert 0 < (ours.fc.weight - given.fc.weight).abs().max() < 1e-3  # two steps away, not a fresh start

    run(folder, monkeypatch, "first", "second", **options, max_steps=4)
    assert f"resuming from {folder / 'run' / 'checkpoint-2'}" in capsys.readouterr().out
    state = json.loads((folder / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    files = [str(folder / f"{name}.jsonl") for name in ("first", "second")]
    both = SCRIPT["read_conversations"](SCRIPT["HeadScriptArguments"]("", files, eval_share=0.2))
    asked = [conversation[0]["content"] for part in both for conversation in part]
    assert read_training_prompts(folder / "run" / "head") == set(map(prompt_fingerprint, ["before", *asked]))
    training = json.loads((folder / "run" / "head" / "metrics.json").read_text())["training"]
    assert training["steps"] == 4 and training["minutes"] >= 0  # a resumed run tells it too


def test_adapters_for_a_domain_are_resumed_and_merged_into_the_head_that_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    given = DraftHead.from_target(target, draft_token_ids=torch.tensor([2, 3, 4, 5, 9, 11]))
    given.save_pretrained(folder / "given")
    options = {"use_peft": True, "lora_r": 2, "lora_target_modules": "q_proj down_proj", "learning_rate": 0.1}
    with pytest.raises(ValueError, match="`use_peft` is set, but adapters need a head.*Pass `head`"):
        run(folder, monkeypatch, **options)
    run(folder, monkeypatch, head=folder / "given", **options)
    run(folder, monkeypatch, head=folder / "given", **options, max_steps=4)
    checkpoint = folder / "run" / "checkpoint-4"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    ours = DraftHead.from_pretrained(folder / "run" / "head", target=target)
    assert torch.equal(ours.fc.weight, given.fc.weight.bfloat16().to(ours.fc.weight))
    moved = (ours.layers[0].mlp.down_proj.weight - given.layers[0].mlp.down_proj.weight).abs().max()
    assert moved > 1e-2


def test_a_head_of_another_target_is_refused_before_any_text_is_read_by_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Architecture("llama", {"num_hidden_layers": 6}).build("sdpa").float()
    DraftHead.from_target(other, draft_vocab_size=12).save_pretrained(folder / "given")
    with pytest.raises(ValueError, match="This head was made for"):
        run(folder, monkeypatch, head=folder / "given")


def test_the_evaluated_texts_stay_the_same_when_a_file_is_added(folder: Path) -> None:
    first, second = (str(folder / f"{name}.jsonl") for name in ("first", "second"))
    arguments = SCRIPT["HeadScriptArguments"]
    alone = SCRIPT["read_conversations"](arguments("", [first], eval_share=0.2))
    both = SCRIPT["read_conversations"](arguments("", [first, second], eval_share=0.2))
    assert alone[1] == both[1] != []
    assert len(both[0]) > len(alone[0]) and both[0][: len(alone[0])] == alone[0]


def test_a_limit_is_of_one_dataset(folder: Path) -> None:
    files = [str(folder / f"{name}.jsonl") for name in ("first", "second")]
    train, held_out = SCRIPT["read_conversations"](SCRIPT["HeadScriptArguments"]("", files, limits=[2]))
    assert len(train) + len(held_out) == 22


def test_one_process_of_several_writes_the_artefact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT["DraftHeadTrainer"], "is_world_process_zero", lambda trainer: False)
    run(folder, monkeypatch)
    assert (folder / "run" / "checkpoint-2").is_dir() and not (folder / "run" / "head" / "README.md").exists()


@pytest.mark.parametrize(
    "kind", [DraftHeadTrainingConfig, SCRIPT["HeadScriptArguments"], SCRIPT["AdapterArguments"]], ids=str
)
def test_every_setting_has_a_help(kind: Any) -> None:
    for one in dataclasses.fields(kind):
        assert one.metadata.get("help"), one.name


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"messages": []}],
        [{"messages": [{"role": "user", "content": "def"}]}],
        [{"prompt": "def"}, {"turns": ["gh", "jk"]}],
    ],
    ids=["no rows", "empty", "one turn", "no assistant turns"],
)
def test_a_dataset_that_nobody_answered_is_refused(
    rows: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "first.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="has an assistant turn|is empty"):
        run(folder, monkeypatch)
    assert not (folder / "run" / "head").exists()


def test_texts_longer_than_the_context_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`max_length` is 99999, but the target reads at most .* Lower `max_length`"):
        run(folder, monkeypatch, max_length=99999)


def test_ctrl_c_says_from_where_the_same_command_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = SCRIPT["DraftHeadTrainer"].train

    def stopped(trainer: Any, **options: Any) -> None:
        train(trainer, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(SCRIPT["DraftHeadTrainer"], "train", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(folder, monkeypatch)
    assert f"Run the same command to resume from {folder / 'run' / 'checkpoint-2'}" in capsys.readouterr().out


def test_settings_of_the_models_come_as_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model_init_kwargs": '{"default_tree":[4,2,2]}', "target_init_kwargs": '{"dtype":"float64"}'}
    run(folder, monkeypatch, **options)
    assert DraftHead.from_pretrained(folder / "run" / "head").config.default_tree == [4, 2, 2]


def asked(question: str, *answers: str) -> Conversation:
    said = [{"role": "assistant", "content": answer} for answer in answers]
    return [{"role": "user", "content": question}, *said]


def test_a_conversation_stays_on_its_side_whatever_is_added_and_with_any_answer() -> None:
    letters = random.Random(0)
    questions = ["".join(letters.choices("abcdefgh", k=9)) for _ in range(400)]
    some = [asked(question, "yes") for question in questions]
    train, held_out = SCRIPT["split_conversations"](some[:200], 0.1)
    assert len(train) + len(held_out) == 200 and 8 <= len(held_out) <= 35
    assert train == [one for one in some[:200] if one in train]
    more_train, more_held_out = SCRIPT["split_conversations"](some[::-1], 0.1)
    assert all(one in more_train for one in train) and all(one in more_held_out for one in held_out)
    assert held_out == [one for one in more_held_out if one in held_out]  # in the same order
    _, other_answers = SCRIPT["split_conversations"]([asked(question, "no", "never") for question in questions], 0.1)
    assert [one[0] for one in other_answers] == [one[0] for one in more_held_out]


def test_what_has_no_answer_or_no_question_has_a_side_too() -> None:
    odd: list[Conversation] = [[], asked("x"), asked("", "a")[1:]]
    train, held_out = SCRIPT["split_conversations"](odd, 0.0)
    assert train == odd and held_out == []


def test_answers_of_another_model_are_told_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(author: str) -> bool:
        (folder / "first.provenance.json").write_text(json.dumps({"arguments": {"target": author}}))
        run(folder, monkeypatch, output_dir=folder / Path(author).name)
        return f"first.jsonl was answered by {author}, but the head is for" in capsys.readouterr().out

    assert told("someone/other") and not told("someone/target")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that answers without compiling its forward in another process."""
    monkeypatch.setattr(generate_dataset, "attach", lambda target, **_: attach(target))


def test_one_command_answers_prompts_trains_for_the_given_time_and_evaluates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answering: None
) -> None:
    options = {"prompts": folder / "first.jsonl", "hours": 0.01, "eval_share": 0.3, "ttt_steps": 1}
    monkeypatch.setattr(DraftHeadTrainer, "seconds_per_step", lambda trainer: 11.0)
    run(folder, monkeypatch, **options)
    answers = [json.loads(line) for line in (folder / "run" / "answers.jsonl").read_text().splitlines()]
    asked = {row["prompt"] for row in map(json.loads, (folder / "first.jsonl").read_text().splitlines())}
    assert answers and {row["messages"][0]["content"] for row in answers} <= asked
    kept = json.loads((folder / "run" / "hours.json").read_text())
    assert 1 <= kept["max_steps"] <= 36 * 0.95 / 11 and kept["seconds"] > 0
    training = json.loads((folder / "run" / "head" / "metrics.json").read_text())
    assert training["training"]["steps"] == kept["max_steps"] and training["held_out_texts"] > 0
    printed = capsys.readouterr().out
    assert "Answering: " in printed and " of the time, 0:00:" in printed

    monkeypatch.setattr(DraftHeadTrainer, "seconds_per_step", lambda trainer: 1 / 0)
    monkeypatch.setattr(generate_dataset, "answer_prompts", lambda *_: 1 / 0)
    run(folder, monkeypatch, **options)  # goes on, and finds that everything is done
    again = json.loads((folder / "run" / "hours.json").read_text())
    assert again["max_steps"] == kept["max_steps"] and again["seconds"] > kept["seconds"]


def test_the_steps_that_are_timed_leave_the_head_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, measure = list[tuple[float, bool]](), DraftHeadTrainer.seconds_per_step

    def timed(trainer: Any) -> float:
        before = {name: part.clone() for name, part in trainer.head.state_dict().items()}
        seconds = measure(trainer)
        same = all(torch.equal(part, before[name]) for name, part in trainer.head.state_dict().items())
        found.append((seconds, same and all(part.grad is None for part in trainer.head.parameters())))
        return 1e9

    monkeypatch.setattr(DraftHeadTrainer, "seconds_per_step", timed)
    run(folder, monkeypatch, hours=0.5)
    assert len(found) == 1 and 0 < found[0][0] < 60 and found[0][1]
    assert json.loads((folder / "run" / "head" / "metrics.json").read_text())["training"]["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hours": 0}, "`hours` is 0.0, but must be above 0"),
        ({"hours": "inf"}, "`hours` is inf"),
    ],
)
def test_a_run_without_time_is_refused(
    options: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        run(folder, monkeypatch, **options)


def test_a_run_without_texts_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_head.py", "--target", str(folder / "target")])
    with pytest.raises(ValueError, match="`datasets` and `prompts` are missing"):
        SCRIPT["main"]()


def test_the_seconds_of_an_interrupted_run_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    first = RunHours(tmp_path, 1.0, is_terminal=False, clock=lambda: now[0])
    now[0] += 600
    first.tick("Answering", "9 answers")
    now[0] += 5  # too early for another line
    first.tick("Answering", "10 answers")
    first.plan(80)
    now[0] = 3.0  # another process
    second = RunHours(tmp_path, 1.0, is_terminal=False, clock=lambda: now[0])
    now[0] += 1195
    assert second.spent == 1800 and second.max_steps == 80
    second.tick("Training")
    assert capsys.readouterr().out.splitlines() == [
        "Answering: 17% of the time, 0:50:00 left, 9 answers",
        "Training: 50% of the time, 0:30:00 left",
    ]
