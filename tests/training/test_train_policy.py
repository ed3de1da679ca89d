"""The script from prompts to a policy, and its recipes."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trl import TrlParser

from tests.targets import Architecture
from transformers_resps import AutoPolicy, CostTable, DraftHead, ReSpSPolicy, TreeShape, attach
from transformers_resps.head import pair_identity
from transformers_resps.policy import ActionGrid
from transformers_resps.trainers import PolicyTrainingConfig


ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "training" / "train_policy.py"), run_name="train_policy")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    given = {
        "target": folder / "target",
        "head": folder / "head",
        "dataset": folder / "prompts.jsonl",
        "output_dir": folder / "run",
        "max_new_tokens": 24,
        "updates": 4,
        "save_updates": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "drop_hopeless": False,  # the tiny target's clock decides nothing here
        **options,
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", *arguments])
    SCRIPT["main"]()


def test_prompts_become_a_policy_and_a_second_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"eval_strategy": "steps", "eval_updates": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "tokens_per_second", "drop_hopeless": False}
    run(folder, monkeypatch, **best)
    recordings = {file: file.stat().st_mtime_ns for file in (folder / "run" / "replay").iterdir()}
    assert len(recordings) == 6
    metrics = json.loads((folder / "run" / "policy" / "metrics.json").read_text())
    assert metrics["tokens_per_second"] > 0 and metrics["oracle_regret"] >= 0
    (folder / "run" / "checkpoint-90").mkdir()  # what a kill leaves of one
    run(folder, monkeypatch, updates=6, **best)
    assert recordings == {file: file.stat().st_mtime_ns for file in (folder / "run" / "replay").iterdir()}
    assert len(metrics) == 7 and metrics["training"]["texts"] == 4
    state = json.loads((folder / "run" / "checkpoint-48" / "trainer_state.json").read_text())
    assert state["global_step"] == 48
    costs = folder / "run" / "costs.json"
    dearer = json.loads(costs.read_text())
    dearer["overhead"] += 1.0
    costs.write_text(json.dumps(dearer))
    with pytest.raises(ValueError, match="checkpoint-48 was trained with other costs than now"):
        run(folder, monkeypatch, updates=8, **best)
    costs.write_text(json.dumps(dearer | {"identity": dearer["identity"] | {"device": "a laptop"}}))
    with pytest.raises(ValueError, match=r"table was measured with device 'a laptop' \(here: .*Run `calibrate"):
        run(folder, monkeypatch, updates=8, **best)

    policy = AutoPolicy.from_pretrained(folder / "run" / "policy")
    target = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_pretrained(folder / "head", target=target)
    assert isinstance(policy, ReSpSPolicy)
    policy.check_identity(**pair_identity(target, head), grid=ActionGrid.small())
    for dtype in (torch.float64, torch.bfloat16):
        policy.check_identity(**pair_identity(target, DraftHead.from_pretrained(folder / "head", dtype=dtype)))
    with pytest.raises(ValueError, match="trained with the head .*it needs fingerprint"):
        policy.check_identity(**pair_identity(target, DraftHead.from_target(target, draft_vocab_size=12)))
    prompt = torch.tensor([[5, 6, 7, 3]])
    plain = target.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(
        target.generate(prompt, assistant_model=head, policy=policy, max_new_tokens=20, do_sample=False), plain
    )


def test_processes_share_the_recording_and_read_what_all_have_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    waited: list[int] = []

    class Scripted(SCRIPT["Recorder"]):  # type: ignore[misc,name-defined]  # a script's classes have no types here
        def _answer(self, prompt: torch.Tensor) -> Any:
            answered.append(int(prompt))
            return None if prompt == 4 else SimpleNamespace(save=lambda file: save_file({"prompt": prompt}, file))

        def _key(self, prompt: torch.Tensor) -> str:
            return f"prompt-{int(prompt)}"

    def process(index: int) -> Any:
        state = SimpleNamespace(wait_for_everyone=lambda: waited.append(index))
        args = SimpleNamespace(process_index=index, world_size=2, output_dir=folder, distributed_state=state)
        return Scripted(None, None, None, None, args)

    monkeypatch.setattr(SCRIPT["ReplayText"], "load", load_file)
    prompts = [torch.tensor([number]) for number in range(5)]
    process(1).record(prompts)
    recorded = process(0).record(prompts)
    assert answered == [1, 3, 0, 2, 4] and waited == [1, 0]
    assert [int(text["prompt"]) for text in recorded] == [0, 1, 2, 3]  # the last answer was too short
    assert {file.suffix for file in (folder / "replay").iterdir()} == {".safetensors"}


def test_a_recording_belongs_to_the_targets_weights_and_not_to_its_path(folder: Path) -> None:
    target: Any = Architecture("llama").build("sdpa").float()
    head = DraftHead.from_target(target, draft_vocab_size=12)

    def key(path: str) -> str:
        script = SCRIPT["PolicyScriptArguments"](path, "head", "prompts.jsonl")
        found: str = SCRIPT["Recorder"](target, head, script, ActionGrid.small(), None)._key(torch.tensor([3]))
        return found

    before = key("here")
    assert key("there") == before
    with torch.no_grad():
        target.get_decoder().layers[0].mlp.down_proj.weight += 0.1
    assert key("here") != before


def test_one_process_of_several_writes_the_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT["PolicyTrainer"], "is_world_process_zero", lambda trainer: False)
    run(folder, monkeypatch, updates=1)
    assert (folder / "run" / "replay").is_dir() and not (folder / "run" / "policy" / "metrics.json").exists()


def test_a_policy_can_be_trained_live_on_the_papers_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, monkeypatch, live=True, objective="max_entropy_ppo", reward="mean_rate", preset="paper", updates=2)
    policy = AutoPolicy.from_pretrained(folder / "run" / "policy")
    assert isinstance(policy, ReSpSPolicy) and policy.config.sample and not policy.config.normalize


def test_a_machine_on_which_nothing_can_pay_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruinous(*_: Any) -> Any:
        return CostTable({1: {1: 1.0, 2: 100.0}}, {}, {})

    monkeypatch.setitem(SCRIPT["main"].__globals__, "measure_costs", ruinous)
    with pytest.raises(ValueError, match="None of the .* could pay on this machine.*policy='auto'"):
        run(folder, monkeypatch, drop_hopeless=True)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="The longest prompt has 6 tokens and its answer up to 9999, but.*Lower"):
        run(folder, monkeypatch, max_new_tokens=9999)


def test_ctrl_c_ends_without_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(SCRIPT["main"].__globals__, "measure_costs", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(folder, monkeypatch)


def test_a_dataset_with_one_prompt_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "prompts.jsonl").write_text('{"prompt": "fghi"}\n{"prompt": "fghi"}')
    with pytest.raises(ValueError, match="has 1 prompts of at most 512 tokens, but three are needed.*larger dataset"):
        run(folder, monkeypatch)


def test_hopeless_shapes_are_left_out() -> None:
    grid = ActionGrid.from_bins((4, 8, 16), (3,), (1, 2, 4)).affordable(lambda shape: 1 + 0.25 * shape.total_tokens)
    assert grid.shapes == (TreeShape.plain(), TreeShape(4, 3, 1), TreeShape(4, 3, 2), TreeShape(4, 3, 4)) + (
        TreeShape(8, 3, 2),
        TreeShape(8, 3, 4),
    )


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("policy_*.yaml")), ids=lambda r: r.stem)
def test_recipes_are_understood(recipe: Path) -> None:
    parser = TrlParser((SCRIPT["PolicyScriptArguments"], PolicyTrainingConfig))
    arguments = ["--config", str(recipe), "--use_cpu", "True"]
    script, args = parser.parse_args_and_config(arguments)
    if recipe.stem.startswith("policy_resps_paper"):
        assert (args.persistence, script.persistence_in_use) == (10, 30)
        assert (args.entropy_coefficient, args.learning_rate, args.clip) == (0.1, 3e-4, 0.2)
        assert args.steps_per_update == 8 and script.grid == script.preset == "paper"
        assert script.live == (recipe.stem == "policy_resps_paper"), "ours is trained on recorded answers"
        assert (args.objective, args.reward, script.drop_hopeless) == ("max_entropy_ppo", "mean_rate", False)
    else:
        assert args.objective == "full_information"


def test_recordings_of_another_format_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, monkeypatch, updates=2)
    older = set((folder / "run" / "replay").iterdir())
    for file in older:
        file.write_bytes(b"as another release wrote them")
    monkeypatch.setitem(SCRIPT["main"].__globals__, "FORMAT", 3)
    run(folder, monkeypatch, updates=3)
    assert len(set((folder / "run" / "replay").iterdir()) - older) == len(older) == 6
