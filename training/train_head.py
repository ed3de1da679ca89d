"""Train a draft head for a target.

    python training/train_head.py --target TARGET --prompts prompts.jsonl --hours 4
    python training/train_head.py --config training/recipes/smollm2_135m_instruct.yaml

With `--prompts` the target first answers these prompts, as `generate_dataset.py` does. With `--hours` the whole run
takes that long on this machine. Ctrl-C and SIGTERM write a checkpoint. The same command continues.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from publishing import check_publishable, recipe_of, write_run
from runs.command_line import parse, run
from runs.hours import AnsweringTicks, RunHours, TrainingTicks
from transformers_resps.data import Conversation, load_conversations
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig
from transformers_resps.trainers.base import newest_checkpoint
from transformers_resps.trainers.loading import default_folder


_ANSWERING, _EVALUATING = 1 / 3, 1 / 20  # shares of `hours`; the rest is for training
_MOST_PROMPTS = 20_000  # that `hours` answers
_TEXT_TOKENS, _ANSWER_TOKENS = 768, 256  # most tokens of a prompt with its answer, and of an answer
_SECONDS_BETWEEN_CHECKPOINTS = 600


@dataclass
class HeadScriptArguments:
    """The target, the data and the head."""

    target: str = field(metadata={"help": "Hub id or folder of the model to draft for."})
    datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "Conversations: JSON or JSONL files, or Hub ids (`owner/name` or `owner/name:config`)."},
    )
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON or JSONL files of prompts that the target answers first, to OUTPUT_DIR/answers.jsonl."
        },
    )
    hours: float | None = field(
        default=None,
        metadata={"help": "How long the run takes on this machine, at most a third of it to answer; sets max_steps."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of datasets from the Hub."})
    target_name: str | None = field(default=None, metadata={"help": "Name of the target to write into the head."})
    limits: list[int] = field(
        default_factory=list, metadata={"help": "Maximum conversations from each dataset; 0 for all."}
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "Head to start from, in any published format; it keeps its draft vocabulary, layers and norms. "
            "By default a new head."
        },
    )
    eval_share: float = field(
        default=0.03,
        metadata={"help": "Share of prompts that are held out. Adding datasets does not change which ones."},
    )
    eval_conversations: int = field(
        default=100,
        metadata={"help": "Maximum held-out conversations of the first dataset to evaluate; 0: train on all."},
    )
    card: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Facts for the card that no run can know, see training/PUBLISHING.md."}
    )


@dataclass
class AdapterArguments:
    """LoRA adapters instead of the whole head, named as in TRL's scripts."""

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on `head` and merge them into the saved head."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters in training."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Layers of the head that get an adapter."},
    )

    def config(self) -> Any:
        """Return the adapters for `DraftHeadTrainer`; `None` trains the whole head."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


def say(text: str) -> None:
    """Print what the run does, once in a run of several processes."""
    if os.environ.get("RANK", "0") == "0":  # as torchrun and accelerate say it
        print(text, flush=True)


def check_arguments(script: HeadScriptArguments, adapters: AdapterArguments) -> None:
    """Raise `ValueError` for wrong arguments, before anything is loaded."""
    if not (script.datasets or script.prompts):
        raise ValueError(
            "`datasets` and `prompts` are missing, but a head learns from texts. Pass conversations, or prompts that "
            "the target shall answer."
        )
    if script.hours is not None and not 0 < script.hours < math.inf:
        raise ValueError(f"`hours` is {script.hours}, but must be above 0. Write 4 for four hours.")
    if adapters.use_peft and script.head is None:
        raise ValueError(
            "`use_peft` is set, but adapters need a head to start from. Pass `head`, or leave `use_peft` out."
        )


def answer_prompts(script: HeadScriptArguments, args: Any, hours: RunHours | None) -> str:
    """Let the target answer `prompts`, for at most a third of `hours`; return the file of the answers.

    Once the training is planned, an interrupted run goes on with the answers that it has.
    """
    import generate_dataset  # here, since most runs need no answers

    output = Path(args.output_dir) / "answers.jsonl"
    if hours is not None and hours.max_steps is not None:
        return str(output)
    config: Any = AutoConfig.from_pretrained(script.target).get_text_config()
    most = getattr(config, "max_position_embeddings", None) or _TEXT_TOKENS
    answered = min(_ANSWER_TOKENS, most // 3)
    given = ["--target", script.target, "--output", str(output), "--seed", str(args.seed)]
    given += ["--dtype", str((args.target_init_kwargs or {}).get("dtype", "auto")), "--limit", str(_MOST_PROMPTS)]
    given += [part for name in script.prompts for part in ("--prompts", name)]
    given += ["--max-new-tokens", str(answered), "--max-prompt-tokens", str(min(most, _TEXT_TOKENS) - answered)]
    given += ["--device", "cpu"] if args.use_cpu else []
    if hours is None:
        progress: Any = partial(generate_dataset.PromptProgress, is_terminal=sys.stderr.isatty())
    else:
        progress = partial(AnsweringTicks, hours, _ANSWERING)
    generate_dataset.answer_prompts(generate_dataset.make_parser().parse_args(given), progress)
    return str(output)


def plan_steps(trainer: DraftHeadTrainer, hours: RunHours) -> None:
    """Set the trainer's steps to as many as fit into the time that is left, or to those of the interrupted run."""
    if hours.max_steps is None:
        left = hours.total * (1 - _EVALUATING) - hours.spent
        hours.plan(max(int(left / trainer.seconds_per_step()), 1))
    args: Any = trainer.args
    args.max_steps = steps = hours.max_steps
    args.save_steps = math.ceil(steps * _SECONDS_BETWEEN_CHECKPOINTS / hours.total)
    args.save_total_limit = args.save_total_limit or 2
    if args.lr_scheduler_type == "warmup_stable_decay":
        args.lr_scheduler_kwargs = {**(args.lr_scheduler_kwargs or {}), "num_decay_steps": steps // 3}
    trainer.add_callback(TrainingTicks(hours))


def warn_of_others_answers(script: HeadScriptArguments) -> None:
    """Tell of datasets that `generate_dataset.py` let another model answer: a head learns its own target's choices."""
    from generate_dataset import provenance_of  # here, as in `answer_prompts`

    own = [Path(name).name for name in (script.target, script.target_name or script.target)]
    for name in script.datasets:
        file = provenance_of(Path(name))
        author = json.loads(file.read_text(encoding="utf-8"))["arguments"]["target"] if file.is_file() else None
        if author is not None and Path(author).name not in own:
            say(
                f"Warning: {name} was answered by {author}, but the head is for {script.target}. It would learn what "
                "another model says; let the target answer the prompts itself."
            )


def read_conversations(script: HeadScriptArguments) -> tuple[list[Conversation], list[Conversation]]:
    """Load the conversations to train on, and held-out ones of the first dataset to evaluate."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    for index, (name, limit) in enumerate(zip_longest(script.datasets, script.limits[: len(script.datasets)])):
        found = islice(load_conversations(name, script.dataset_split), limit or None)
        kept, others = split_conversations(found, script.eval_share if script.eval_conversations else 0.0)
        train += kept
        held_out = held_out if index else others[: script.eval_conversations]
        say(f"{name}: {len(kept)} conversations to train on, {len(others)} held out")
    return train, held_out


def split_conversations(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations: the ones to train on, in their order, and about `share` of them, 0 to 1, held out.

    The first question alone decides, so a conversation stays on its side when the dataset grows, and all answers to
    one question are on the same side. It also decides the order of the held-out conversations.
    """
    training: list[Conversation] = []
    held_out: list[Conversation] = []
    for conversation in conversations:
        (held_out if _place(conversation) < share else training).append(conversation)
    return training, sorted(held_out, key=_place)


def _place(conversation: Conversation) -> float:
    """Return a number in [0, 1) that depends only on the messages before the first answer."""
    roles = [message["role"] for message in conversation]
    is_answered = "user" in roles and "assistant" in roles[roles.index("user") :]
    end = roles.index("assistant", roles.index("user")) if is_answered else len(roles)
    asked = "\0".join(message["content"] for message in conversation[:end])
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:6]) / 2**48


def make_trainer(script: HeadScriptArguments, adapters: AdapterArguments, args: Any) -> DraftHeadTrainer:
    """Make the trainer of the head in `script.head`, or of a new one, on the conversations."""
    from datasets import Dataset  # of the extra `train`, which `parse` has asked for

    warn_of_others_answers(script)
    train, held_out = (Dataset.from_list([{"messages": one} for one in part]) for part in read_conversations(script))
    say(f"loading {script.target}" + (f" and starting from {script.head}" if script.head else ""))
    trainer = DraftHeadTrainer(
        script.head, args, train, held_out or None, peft_config=adapters.config(), target=script.target
    )
    vocabulary = trainer.draft_vocabulary()
    say(f"draft vocabulary: {len(vocabulary.token_ids)} tokens cover {vocabulary.coverage:.2%} of the answers")
    if script.target_name is not None:
        trainer.head.target["name_or_path"] = script.target_name
    return trainer


def main() -> None:
    script, adapters, args = parse(HeadScriptArguments, AdapterArguments, DraftHeadTrainingConfig)
    check_arguments(script, adapters)
    if args.output_dir == DraftHeadTrainingConfig().output_dir:
        args.output_dir = default_folder(script.target, DraftHeadTrainer.artefact_name)
    recipe = recipe_of(sys.argv, {**asdict(script), **asdict(adapters)})
    check_publishable(recipe, args, script.target_name or script.target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    hours = None
    if script.hours is not None:
        hours = RunHours(Path(args.output_dir), script.hours, is_terminal=sys.stderr.isatty())
        args.disable_tqdm = True
    if script.prompts:
        script.datasets = [answer_prompts(script, args, hours), *script.datasets]
    checkpoint = newest_checkpoint(Path(args.output_dir))
    trainer = make_trainer(script, adapters, args)
    if hours is not None:
        plan_steps(trainer, hours)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (KeyboardInterrupt, SystemExit) as stop:
        resumed = newest_checkpoint(Path(args.output_dir)) or "the beginning"
        say(f"Stopped. Run the same command to resume from {resumed}.")
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if hours is not None:
        hours.close()
    if not trainer.is_world_process_zero():
        return
    write_run(trainer.artefact_folder, recipe, name=trainer.hub_model_id)
    if args.push_to_hub:
        print(f"pushed: {trainer.push_to_hub()}")
    print(evaluation)
    print(f'\nUse it:\n  head = AutoDraftHead.from_pretrained("{trainer.artefact_folder}", target=model)')
    print('  model.generate(**inputs, assistant_model=head, policy="auto")')


if __name__ == "__main__":
    run(main)
