r"""Train a policy for a target and its head, on prompts of your domain.

    python training/train_policy.py --config training/recipes/policy.yaml --target TARGET --head HEAD \
        --dataset my.jsonl --output_dir my-policy

It makes prompts of a dataset for `PolicyTrainer`, and holds some of them out. `--policy resps` trains a Re-SpS policy
for this machine. `--policy auto` fits `policy="auto"` to the head and the prompts, for any machine. If the run is
stopped, the same command goes on with it.

The result is `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. Its gain on held-out prompts is printed.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prompts.policy_prompts import PromptArguments
from publishing import check_publishable, recipe_of, write_run
from runs.command_line import parse
from runs.refusal import run
from transformers_resps.hub.upload import METRICS
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tools.loading import load_target
from transformers_resps.trainers import PolicyTrainer, PolicyTrainingConfig, fit_policy
from transformers_resps.trainers.base import newest_checkpoint, push_folder
from transformers_resps.trainers.loading import check_target_name
from transformers_resps.trainers.policy_trainer import without_guard


@dataclass
class PolicyScriptArguments(PromptArguments):
    """The policy to train, and its reward."""

    policy: str = field(
        default="resps",
        metadata={"help": "resps: a new Re-SpS policy. auto: fit policy='auto'. Or a folder or Hub id to go on from."},
    )
    reward_func: str = field(
        default="tokens_per_second", metadata={"help": "tokens_per_second, or mean_rate as in Re-SpS."}
    )


def main() -> None:
    script, args = parse(PolicyScriptArguments, PolicyTrainingConfig)
    recipe = recipe_of(sys.argv, asdict(script))
    check_publishable(recipe, args, script.target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    check_target_name(script.target)
    target = load_target(script.target, script.target_dtype, str(args.device), packed=script.pack)
    tokenizer = AutoTokenizer.from_pretrained(script.target)
    learned, watched, tested = script.read_prompts(tokenizer)
    given: dict[str, Any] = {"args": args, "train_dataset": learned, "processing_class": tokenizer}
    given |= {"target": target, "head": script.head}
    policy, _ = (script.policy, None) if script.policy in ("resps", "auto") else without_guard(script.policy)
    if policy == "auto" or isinstance(policy, ThroughputPolicy):
        fit_policy(script.policy, eval_dataset=tested, **given)
        is_main = bool(args.should_save)
    else:
        trainer = PolicyTrainer(script.policy, eval_dataset=watched, reward_func=script.reward_func, **given)
        trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
        trainer.evaluate(tested, metric_key_prefix="test")  # the watched ones may have chosen the checkpoint
        is_main = trainer.is_world_process_zero()
    if is_main:
        publish_run(args, recipe)


def publish_run(args: PolicyTrainingConfig, recipe: str) -> None:
    """Write the facts for a card beside the policy, push both if asked to, and print how good the policy is."""
    folder = Path(args.output_dir) / "policy"
    found = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    write_run(folder, recipe, name=args.hub_model_id)
    if args.push_to_hub:
        print(f"pushed: {push_folder(folder, args)}")
    print(json.dumps(found, indent=2))
    print(found["verdict"])


if __name__ == "__main__":
    run(main)
