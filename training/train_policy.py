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

from publishing import check_publishable, recipe_of, write_run
from runs.command_line import parse, run
from transformers_resps.data import Conversation, load_conversations, to_tokens
from transformers_resps.hub.upload import METRICS
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tools.loading import load_target
from transformers_resps.trainers import PolicyTrainer, PolicyTrainingConfig, fit_policy
from transformers_resps.trainers.base import newest_checkpoint, push_folder
from transformers_resps.trainers.data import name_of
from transformers_resps.trainers.policy_trainer import without_guard


@dataclass
class PolicyScriptArguments:
    """The target, its drafter, the prompts that it answers, the policy to train, and its reward."""

    target: str = field(metadata={"help": "Hub id or folder of the model that decodes."})
    head: str = field(metadata={"help": "Hub id or folder of its draft head."})
    dataset: str = field(metadata={"help": "JSON or JSONL file, or Hub id, of conversations: their prompts are used."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset from the Hub."})
    target_dtype: str = field(default="auto", metadata={"help": "A torch dtype name, or auto."})
    pack: bool = field(
        default=False, metadata={"help": "With packed weights, as a benchmark with --pack will measure."}
    )
    limit: int = field(default=200, metadata={"help": "Maximum number of prompts; 0 for all."})
    held_out: float = field(
        default=0.3,
        metadata={
            "help": "Share of the prompts not learned from: half to watch training by, half for the final figure."
        },
    )
    max_prompt_tokens: int = field(default=512, metadata={"help": "Longer prompts are left out."})
    card: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "What a card must tell and no run can know: see training/PUBLISHING.md."},
    )
    policy: str = field(
        default="resps",
        metadata={"help": "resps: a new Re-SpS policy. auto: fit policy='auto'. Or a folder or Hub id to go on from."},
    )
    reward_func: str = field(
        default="tokens_per_second", metadata={"help": "tokens_per_second, or mean_rate as in Re-SpS."}
    )

    def read_prompts(self, tokenizer: Any) -> list[Any]:
        """Load the first `limit` prompts that are short enough (all turns up to the last question), in three parts.

        Returns:
            Datasets of `messages` to learn from, to watch training by, and for the final figure; the hash of a prompt
            decides where it belongs, not its place in the dataset.

        Raises:
            ValueError: fewer than three are left.
        """
        found: dict[str, Conversation] = {}
        for conversation in load_conversations(self.dataset, self.dataset_split):
            asked = [place for place, message in enumerate(conversation) if message["role"] == "user"]
            turns = conversation[: asked[-1] + 1 if asked else 0]
            if turns and len(tokens := to_tokens(turns, tokenizer)) <= self.max_prompt_tokens:
                found[name_of(tokens)] = turns
            if len(found) == (self.limit or -1):
                break
        if len(found) < 3:
            raise ValueError(
                f"{self.dataset} has {len(found)} prompts of at most {self.max_prompt_tokens} tokens, but three are "
                "needed: to learn from, to watch training by, and to see whether it helped. Pass a larger dataset, or "
                "raise --max_prompt_tokens."
            )
        ordered = [{"messages": found[name]} for name in sorted(found)]
        half = min(max(1, round(self.held_out * len(ordered) / 2)), (len(ordered) - 1) // 2)
        learned = len(ordered) - 2 * half
        told = "%d prompts: %d to learn from, %d to watch training by, %d for the final figure"
        logging.getLogger(__name__).info(told, len(ordered), learned, half, half)
        from datasets import Dataset  # of the extra `train`, which `parse` has asked for

        return [Dataset.from_list(part) for part in (ordered[2 * half :], ordered[half : 2 * half], ordered[:half])]


def main() -> None:
    script, args = parse(PolicyScriptArguments, PolicyTrainingConfig)
    recipe = recipe_of(sys.argv, asdict(script))
    check_publishable(recipe, args, script.target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
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
    print(f'\nUse it:\n  policy = AutoPolicy.from_pretrained("{folder}")')
    print("  model.generate(**inputs, assistant_model=head, policy=policy)")


if __name__ == "__main__":
    run(main)
