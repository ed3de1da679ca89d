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

from transformers import AutoTokenizer

from prompts.policy_prompts import PromptArguments
from publishing import check_publishable, recipe_of, write_run
from runs.command_line import parse
from runs.refusal import run
from transformers_resps.hub import METRICS
from transformers_resps.tools.loading import load_target
from transformers_resps.tools.results import machine
from transformers_resps.trainers import PolicyTrainer, PolicyTrainingConfig
from transformers_resps.trainers.base import newest_checkpoint
from transformers_resps.trainers.loading import check_target_name
from transformers_resps.trainers.policy_config import RENAMED


@dataclass
class PolicyScriptArguments(PromptArguments):
    """What is trained, and what for."""

    policy: str = field(
        default="resps",
        metadata={"help": "resps: a new Re-SpS policy. auto: fit policy='auto'. Or a folder or Hub id to go on from."},
    )
    reward_func: str = field(
        default="tokens_per_second", metadata={"help": "tokens_per_second, or mean_rate as in Re-SpS."}
    )


def main() -> None:
    script, args = parse(PolicyScriptArguments, PolicyTrainingConfig, renamed=RENAMED)
    recipe = recipe_of(sys.argv, asdict(script))
    check_publishable(recipe, args, script.target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    check_target_name(script.target)
    target = load_target(script.target, script.target_dtype, str(args.device), packed=script.pack)
    tokenizer = AutoTokenizer.from_pretrained(script.target)
    learned, watched, tested = script.read_prompts(tokenizer)
    trainer = PolicyTrainer(
        script.policy,
        args,
        learned,
        watched,
        tokenizer,
        target=target,
        head=script.head,
        reward_func=script.reward_func,
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
    metrics = trainer.evaluate(tested, metric_key_prefix="test")  # the watched ones may have chosen the checkpoint
    if not trainer.is_world_process_zero():
        return
    folder, where = trainer.artefact_folder, machine(target)
    found = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    steps = {"steps": trainer.state.global_step} if trainer.state.global_step else {}
    found["training"] = {**steps, "texts": len(learned), "dtype": where["dtype"], "device": where["device"]}
    write_run(folder, found, recipe, name=trainer.hub_model_id)
    if args.push_to_hub:
        print(f"pushed: {trainer.push_to_hub()}")
    print(json.dumps(metrics, indent=2))
    print(found["verdict"])


if __name__ == "__main__":
    run(main)
