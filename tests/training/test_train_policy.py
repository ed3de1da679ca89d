"""The script from prompts to a policy, and its recipes."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import TrlParser

from publishing import find_faults
from runs import command_line
from tests.targets import Architecture
from tests.training.publishing.tiny import CARD
from transformers_resps import (
    AutoPolicy,
    BaselineGuard,
    CostTable,
    DraftHead,
    ReSpSPolicy,
    ThroughputPolicy,
    TreeShape,
    attach,
)
from transformers_resps.calibration import identity_of
from transformers_resps.heads import pair_identity
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.trainers import PolicyTrainingConfig, data


ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    recipe for kind in ("policy", "throughput") for recipe in (ROOT / "training" / "recipes").glob(f"{kind}*.yaml")
)
SCRIPT = runpy.run_path(str(ROOT / "training" / "train_policy.py"), run_name="train_policy")


NEEDED = ["--target", "a", "--head", "b", "--dataset", "c"]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    given = {"target": folder / "target", "head": folder / "head", "dataset": folder / "prompts.jsonl"}
    given |= {"output_dir": folder / "run", "max_completion_length": 24, "max_steps": 16, "save_steps": 8}
    given |= {"use_cpu": True, "disable_tqdm": True}
    given |= {"drop_hopeless": False}  # the tiny target's clock decides nothing here
    arguments = [part for name, value in (given | options).items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_policy.py", *arguments])
    SCRIPT["main"]()


def test_prompts_become_a_policy_and_a_second_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 8, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "tokens_per_second"}
    run(folder, monkeypatch, **best)
    recordings = {file: file.stat().st_mtime_ns for file in (folder / "run" / "replay").iterdir()}
    assert len(recordings) == 6
    metrics = json.loads((folder / "run" / "policy" / "metrics.json").read_text())
    assert metrics["tokens_per_second"] > 0 and metrics["oracle_regret"] >= 0 and metrics["held_out_texts"] == 1
    assert metrics["training"]["texts"] == 4 and metrics["training"]["steps"] == 16
    assert f"{metrics['verdict']}\n\nUse it:\n  policy = AutoPolicy.from_pretrained(" in capsys.readouterr().out
    assert metrics["verdict"] in (folder / "run" / "policy" / "README.md").read_text()
    (folder / "run" / "checkpoint-90").mkdir()  # what a kill leaves of one
    run(folder, monkeypatch, **best | {"max_steps": 24})
    assert recordings == {file: file.stat().st_mtime_ns for file in (folder / "run" / "replay").iterdir()}
    state = json.loads((folder / "run" / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["global_step"] == 24

    policy = AutoPolicy.from_pretrained(folder / "run" / "policy")
    target = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_pretrained(folder / "head", target=target)
    assert isinstance(policy, ReSpSPolicy)
    policy.check_identity(**pair_identity(target, head), grid=ActionGrid.small())
    for dtype in (torch.float64, torch.bfloat16):
        policy.check_identity(**pair_identity(target, DraftHead.from_pretrained(folder / "head", dtype=dtype)))
    with pytest.raises(ValueError, match="trained with the head .*it needs fingerprint"):
        policy.check_identity(**pair_identity(target, DraftHead.from_target(target, draft_vocab_size=12)))


def test_auto_is_fitted_to_prompts_and_lacks_only_its_measurements(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "throughput_policy.yaml").read_text())
    given = {"target": "target", "head": "head", "dataset": "prompts.jsonl", "output_dir": "run"}
    given["card"] = CARD | {"head": "maker/tiny-head"}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**recipe, **given, "max_completion_length": 16}))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--config", "mine.yaml", "--use_cpu", "True"])
    SCRIPT["main"]()
    made = Path("run/policy")
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["held_out_texts"] == 1 and metrics["training"]["texts"] == 4
    (fault,) = find_faults(made, "policy")
    assert fault.startswith("results.json is missing")
    assert "weighs each node" in (card := (made / "README.md").read_text()) and "A guard stops drafting" in card
    policy = AutoPolicy.from_pretrained(made)
    assert isinstance(policy, BaselineGuard) and isinstance(policy.policy, ThroughputPolicy)


def test_one_process_of_several_writes_the_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT["PolicyTrainer"], "is_world_process_zero", lambda trainer: False)
    run(folder, monkeypatch, max_steps=8)
    assert (folder / "run" / "replay").is_dir() and not (folder / "run" / "policy" / "README.md").exists()


def test_a_machine_on_which_nothing_can_pay_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruinous(target: Any, head: DraftHead) -> CostTable:
        return CostTable({1: {1: 1.0, 2: 100.0}}, {}, identity_of(target, head))

    monkeypatch.setattr(data, "calibrate", ruinous)
    with pytest.raises(ValueError, match="None of the .* could pay on this machine.*policy='auto'"):
        run(folder, monkeypatch, drop_hopeless=True)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="The longest .* has 6 tokens and its answer up to 9999, but.*lower"):
        run(folder, monkeypatch, max_completion_length=9999)


def test_ctrl_c_ends_without_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "calibrate", stopped)
    with pytest.raises(SystemExit, match="130"):
        command_line.run(lambda: run(folder, monkeypatch))


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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipes_are_understood(recipe: Path) -> None:
    parser = TrlParser((SCRIPT["PolicyScriptArguments"], PolicyTrainingConfig))
    needed = [] if "\ncard:" in recipe.read_text() or "meta-llama" in recipe.read_text() else NEEDED
    arguments = ["--config", str(recipe), "--use_cpu", "True", *needed]
    script, args = parser.parse_args_and_config(arguments)
    if recipe.stem.startswith("policy_resps_paper"):
        assert args.entropy_coef == 0.1 and args.steps_per_update == 8, "the paper's, which no recipe names"
        assert args.live_rollouts == (recipe.stem == "policy_resps_paper"), "ours is trained on recorded answers"
    else:
        assert args.objective == "full_information"
        assert (script.policy == "auto") == recipe.stem.startswith("throughput")
