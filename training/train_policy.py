"""Train a Re-SpS policy for a target and its head, on prompts of your domain.

    python training/train_policy.py --config training/recipes/policy_smollm2_135m_instruct.yaml --dataset my.jsonl

The target answers the prompts once, and for every position it is recorded what each tree shape would have emitted.
Costs are measured on this machine. The policy then learns without decoding. With `live`, it learns by decoding. If the
run is interrupted, the same command resumes it.

The result is `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. Its gain on held-out prompts is printed.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prompts.policy_prompts import PromptArguments, Prompts, name_of
from publishing import check_publishable, recipe_of, write_run
from runs.command_line import parse
from transformers_resps import DraftHead, TreeShape, attach
from transformers_resps.bench.models import load_target
from transformers_resps.bench.provenance import machine
from transformers_resps.calibration.cost_table import CostTable
from transformers_resps.calibration.measuring import calibrate
from transformers_resps.data import write_training_prompts
from transformers_resps.generation.sampling import sampling
from transformers_resps.head import pair_identity, parameter_fingerprint
from transformers_resps.policy import ActionGrid, ReSpSConfig, ReSpSPolicy
from transformers_resps.replay import OutcomeTable, ReplayText, record_text
from transformers_resps.replay.replay_text import FORMAT
from transformers_resps.trainers import LiveRollouts, PolicyTrainer, PolicyTrainingConfig, ReplayRollouts
from transformers_resps.trainers.checkpoints import check_resumable, newest_checkpoint


@dataclass
class PolicyScriptArguments(PromptArguments):
    """How the policy learns and what it chooses from."""

    live: bool = field(default=False, metadata={"help": "Learn by decoding; ppo objectives only."})
    grid: str = field(
        default="small", metadata={"help": "small: plain and up to 16 nodes. paper: the 177 shapes of Re-SpS."}
    )
    drop_hopeless: bool = field(
        default=True, metadata={"help": "Leave out shapes that could not pay here even if all drafts were accepted."}
    )
    preset: str = field(
        default="repaired",
        metadata={"help": "repaired: normalised features, likeliest action. paper: raw features, drawn at 1.5."},
    )
    persistence_in_use: int = field(default=30, metadata={"help": "Steps that a decision is kept in use; Re-SpS: 30."})
    reward_includes_drafting: bool = field(
        default=True, metadata={"help": "Count drafting as part of a step's time; Re-SpS does not."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("grid", ("small", "paper")), ("preset", ("repaired", "paper"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but must be {' or '.join(allowed)}. See --help."
                )


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def generation_settings(script: PolicyScriptArguments) -> dict[str, Any]:
    return {"max_new_tokens": script.max_new_tokens, **sampling(script.temperature)}


@dataclass
class Recorder:
    """Lets the target answer prompts, and records the draft pools of the answers in a folder."""

    target: PreTrainedModel
    head: DraftHead
    script: PolicyScriptArguments
    grid: ActionGrid
    args: PolicyTrainingConfig

    def record(self, prompts: list[Tensor]) -> list[ReplayText]:
        """Recordings of all prompts with an answer of at least two tokens; existing ones are reused.

        Each process records its share, then reads the recordings of all.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        share = prompts[self.args.process_index :: self.args.world_size]
        for number, prompt in enumerate(share, start=1):
            file = self._file(prompt)
            text = None if file.is_file() else self._answer(prompt)
            if text is not None:
                unfinished = file.with_suffix(f".{os.getpid()}")
                text.save(unfinished)
                unfinished.replace(file)
            if number % 20 == 0:
                print(f"recorded {number} of {len(share)} answers")
        self.args.distributed_state.wait_for_everyone()
        return [ReplayText.load(file) for file in map(self._file, prompts) if file.is_file()]

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir) / "replay"

    def _file(self, prompt: Tensor) -> Path:
        return self.folder / f"{self._key(prompt)}.safetensors"

    def _key(self, prompt: Tensor) -> str:
        return f"{name_of(prompt)}-{self._made_with}"

    @cached_property
    def _made_with(self) -> str:
        """Changes with everything that changes a recording: the target's weights, not its path."""
        answered = [parameter_fingerprint(self.target), str(self.target.dtype), generation_settings(self.script)]
        return digest([FORMAT, *answered, self.head.fingerprint(), self.grid.to_list()])[:8]

    def _answer(self, prompt: Tensor) -> ReplayText | None:
        torch.manual_seed(int(name_of(prompt), 16) % 2**31)  # an answer does not depend on earlier ones
        model: Any = self.target
        inputs = prompt[None].to(model.device)
        settings = generation_settings(self.script)
        text = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), assistant_model=self.head, policy="auto", **settings
        )[0]
        answered = len(text) - len(prompt)
        if answered < 2:
            return None
        spare_room = self.script.max_new_tokens - answered
        return record_text(self.target, self.head, text, len(prompt), grid=self.grid, spare_room=spare_room)


def measure_costs(
    target: PreTrainedModel, head: DraftHead, script: PolicyScriptArguments, args: PolicyTrainingConfig
) -> CostTable:
    """What steps cost on this machine; a resumed run keeps the costs that it started with.

    One process measures while the others wait: together they would slow each other and learn different costs.

    Raises:
        ValueError: the run started on another machine, or with another target or head.
    """
    file = Path(args.output_dir) / "costs.json"
    with args.main_process_first(desc="measuring what steps cost"):
        if not file.is_file():
            calibrate(target, head).save(file)
    table = CostTable.load(file)
    table.check_here(target, head)
    return table if script.reward_includes_drafting else replace(table, draft={})


def make_policy(
    script: PolicyScriptArguments, target: PreTrainedModel, head: DraftHead, grid: ActionGrid, seed: int
) -> ReSpSPolicy:
    width = head.config.features_width
    config = ReSpSConfig.paper(width) if script.preset == "paper" else ReSpSConfig(width)
    identity = pair_identity(target, head)
    return ReSpSPolicy(replace(config, grid=grid, persistence=script.persistence_in_use, **identity), seed=seed)


def paying_shapes(grid: ActionGrid, seconds: Callable[[TreeShape], float]) -> ActionGrid:
    """The shapes of `grid` that could pay here.

    Raises:
        ValueError: there is none, so nothing to learn.
    """
    kept = grid.affordable(seconds)
    if len(kept.shapes) == 1:
        raise ValueError(
            f"None of the {len(grid.shapes)} shapes could pay on this machine, even with all drafts accepted. Decode "
            "with `policy='auto'`, or pass `drop_hopeless: false`."
        )
    return kept


def facts_of(prompts: Prompts, recorder: Recorder, costs: CostTable) -> dict[str, str]:
    """Hashes of what a run learns from: a checkpoint is resumed only with the same."""
    shapes, longest = recorder.grid, recorder.script.max_prompt_tokens
    return {
        "target": parameter_fingerprint(recorder.target),
        "head": recorder.head.fingerprint(),
        "prompts": digest([list(map(name_of, part)) for part in (prompts.train, prompts.watched, prompts.tested)]),
        "shapes": digest(shapes.to_list()),
        "costs": digest([[costs.step_seconds(shape, context) for shape in shapes.shapes] for context in (0, longest)]),
    }


def main() -> None:
    try:
        run()
    except KeyboardInterrupt:
        print("Stopped. Run the same command to resume.")
        sys.exit(130)


def run() -> None:
    script, args = parse(PolicyScriptArguments, PolicyTrainingConfig)
    recipe = recipe_of(sys.argv, asdict(script))
    check_publishable(recipe, args, script.target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    target = attach(load_target(script.target, script.target_dtype, str(args.device), packed=script.pack))
    head = DraftHead.from_pretrained(script.head, target=target)
    prompts = script.read_prompts()
    prompts.check_context(target, script.max_new_tokens)
    costs = measure_costs(target, head, script, args)
    grid = ActionGrid.paper() if script.grid == "paper" else ActionGrid.small()
    if script.drop_hopeless:
        grid = paying_shapes(grid, lambda shape: costs.step_seconds(shape, script.max_prompt_tokens // 2))
    policy = make_policy(script, target, head, grid, args.seed)
    recorder = Recorder(target, head, script, grid, args)
    with args.main_process_first(desc="comparing with the run that is resumed"):
        check_resumable(args.output_dir, facts_of(prompts, recorder, costs))
    trainer, metrics = train(policy, recorder, prompts, costs)
    if not trainer.is_world_process_zero():
        return
    trainer.save_model()
    write_training_prompts(trainer.artefact_folder, prompts.first_questions)
    facts = {"steps": trainer.state.global_step, "texts": len(prompts.train), "device": machine(target)["device"]}
    told = {name.removeprefix("test_"): value for name, value in metrics.items()}
    found = {"held_out_texts": len(prompts.tested), **told, "training": facts}
    write_run(trainer.artefact_folder, found, recipe, name=args.hub_model_id if args.push_to_hub else None)
    if args.push_to_hub:
        print(f"pushed: {trainer.push_to_hub()}")
    print(json.dumps(metrics, indent=2))


def train(
    policy: ReSpSPolicy, recorder: Recorder, prompts: Prompts, costs: CostTable
) -> tuple[PolicyTrainer, dict[str, float]]:
    """The trainer after training, and the policy's metrics on the test prompts."""
    script, args, grid = recorder.script, recorder.args, recorder.grid

    def replayed(some: list[Tensor]) -> ReplayRollouts:
        return ReplayRollouts(OutcomeTable([text.outcomes(grid, costs) for text in recorder.record(some)]))

    if script.live:
        settings = generation_settings(script)
        includes_drafting = script.reward_includes_drafting
        rollouts: Any = LiveRollouts(
            recorder.target, recorder.head, prompts.train, includes_drafting=includes_drafting, **settings
        )
    else:
        rollouts = replayed(prompts.train)
    trainer = PolicyTrainer(policy, args, rollouts, replayed(prompts.watched))
    trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
    trainer.eval_rollouts = replayed(prompts.tested)  # the watched ones may have chosen the checkpoint
    return trainer, trainer.evaluate(metric_key_prefix="test")


if __name__ == "__main__":
    main()
