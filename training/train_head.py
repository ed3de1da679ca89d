"""Train a draft head for a target.

    python training/train_head.py --config training/recipes/smollm2_135m_instruct.yaml

Ctrl-C writes a checkpoint. The same command resumes from the newest checkpoint in `output_dir`.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import set_seed

from publishing import check_publishable, head_metrics, recipe_of, write_run
from runs.command_line import parse
from runs.context import check_context
from runs.timing import TimingCallback
from transformers_resps import DraftHead
from transformers_resps.bench.models import load_target, training_prompts_of
from transformers_resps.bench.provenance import machine
from transformers_resps.data import (
    Conversation,
    Example,
    choose_draft_vocabulary,
    load_conversations,
    make_examples,
    split_examples,
    vocabulary_of,
    write_training_prompts,
)
from transformers_resps.trainers import (
    CachedFeatures,
    DraftHeadTrainer,
    DraftHeadTrainingConfig,
    ExampleDataset,
    FrozenTarget,
)
from transformers_resps.trainers.checkpoints import newest_checkpoint


@dataclass
class HeadScriptArguments:
    """The target, the data and the head."""

    target: str = field(metadata={"help": "Hub id or folder of the model to draft for."})
    datasets: list[str] = field(
        metadata={"help": "Conversations: JSON or JSONL files, or Hub ids (`owner/name` or `owner/name:config`)."}
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
            "By default a new head. A checkpoint in `output_dir` takes precedence."
        },
    )
    draft_vocab_size: int = field(default=8192, metadata={"help": "Draft vocabulary of a new head; 0 for all tokens."})
    max_length: int = field(default=512, metadata={"help": "Maximum sequence length in tokens; longer ones are cut."})
    eval_share: float = field(
        default=0.03,
        metadata={"help": "Share of prompts that are held out. Adding datasets does not change which ones."},
    )
    eval_conversations: int = field(
        default=100, metadata={"help": "Maximum held-out sequences of the first dataset to evaluate; 0: train on all."}
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Cache the target's features in this folder, and read them in every epoch."}
    )
    target_dtype: str = field(default="auto", metadata={"help": "A torch dtype name, or auto."})
    fc_norm: bool = field(
        default=True,
        metadata={
            "help": "Normalise each feature layer of a new head (EAGLE-3.1): deep layers are often 20 times larger."
        },
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of a new head's MLP; by default the target's."}
    )
    default_tree: list[int] | None = field(
        default=None,
        metadata={"help": "total_tokens, depth and top_k of the head's default tree; 8 4 2 for a new head."},
    )
    card: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Facts for the card that no run can know, see docs/publish.md."},
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
        """For `DraftHeadTrainer`; `None` trains the whole head."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


def conversations_of(script: HeadScriptArguments) -> Iterator[tuple[str, Iterator[Conversation]]]:
    """Each dataset's name and as many of its conversations as `limits` says."""
    for name, limit in zip_longest(script.datasets, script.limits[: len(script.datasets)]):
        yield name, islice(load_conversations(name, script.dataset_split), limit or None)


def read_examples(script: HeadScriptArguments, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those of the first dataset to evaluate."""
    train: list[Example] = []
    held_out: list[Example] = []
    for index, (name, conversations) in enumerate(conversations_of(script)):
        examples = make_examples(conversations, tokenizer, script.max_length)
        kept, others = split_examples(examples, script.eval_share if script.eval_conversations else 0.0)
        train += kept
        held_out = held_out if index else others[: script.eval_conversations]
        tokens = sum(int(example.predicted.sum()) for example in kept)
        print(f"{name}: {len(kept)} sequences with {tokens} assistant tokens to train on, {len(others)} held out")
    return train, held_out


def first_questions(script: HeadScriptArguments) -> Iterator[str]:
    """The first user turn of every conversation, held-out ones included."""
    for _, conversations in conversations_of(script):
        for conversation in conversations:
            yield from [message["content"] for message in conversation if message["role"] == "user"][:1]


def make_head(
    script: HeadScriptArguments, start: str | None, target: PreTrainedModel, tokenizer: Any, texts: list[Example]
) -> DraftHead:
    """The head in `start`, or a new one with a vocabulary counted from `texts`; in float32."""
    if start is not None:
        head = DraftHead.from_pretrained(start, target=target, dtype=torch.float32)
        vocabulary = vocabulary_of(head, texts)
        print(f"starting from {start}")
    else:
        everything = target.config.get_text_config().vocab_size
        size = script.draft_vocab_size or everything
        always = {i for i in [tokenizer.eos_token_id, *tokenizer.all_special_ids] if i is not None}
        vocabulary = choose_draft_vocabulary(texts, everything, size, always)
        ids = vocabulary.token_ids if script.draft_vocab_size else None
        width = {"intermediate_size": script.intermediate_size} if script.intermediate_size else {}
        head = DraftHead.from_target(
            target, draft_token_ids=ids, default_tree=[8, 4, 2], fc_norm=script.fc_norm, **width
        ).float()
    print(f"draft vocabulary: {len(vocabulary.token_ids)} tokens cover {vocabulary.coverage:.2%} of the answers")
    head.config.default_tree = script.default_tree or head.config.default_tree
    if script.target_name is not None:
        head.config.target = {**(head.config.target or {}), "name_or_path": script.target_name}
    return head


def training_facts(trainer: DraftHeadTrainer, texts: int, seconds: float | None) -> dict[str, Any]:
    """Size and duration of the run, over all resumptions."""
    facts = {"steps": trainer.state.global_step, "texts": texts, "epochs": round(trainer.state.epoch or 0.0, 3)}
    if seconds is not None:
        facts["minutes"] = round(seconds / 60, 1)
    where = machine(trainer.target.model)
    return {**facts, "dtype": "bfloat16" if trainer.args.bf16 else "float32", "device": where["device"]}


def metrics_of(
    head: DraftHead, evaluation: dict[str, Any], tau_texts: int, train: list[Example], held_out: int
) -> dict[str, Any]:
    """The quality of a head, for `metrics.json`."""
    tree = str(replace(head.default_shape, lookup=0))  # the tree of `simulated_tau`
    return {
        **head_metrics(evaluation, tree, held_out, tau_texts),
        "draft_vocab_size": head.config.proposable_tokens,
        "coverage": vocabulary_of(head, train).coverage,
    }


def datasets_of(
    script: HeadScriptArguments,
    head: DraftHead,
    target: PreTrainedModel,
    train: list[Example],
    held_out: list[Example],
) -> tuple[Any, Any]:
    """Datasets for training and evaluation; the latter is `None` if nothing is held out."""
    if script.feature_cache_dir is None:
        return ExampleDataset(train), ExampleDataset(held_out) if held_out else None
    frozen = FrozenTarget(target, list(head.config.feature_layers or []))
    evaluated = CachedFeatures(held_out, script.feature_cache_dir, frozen) if held_out else None
    return CachedFeatures(train, script.feature_cache_dir, frozen), evaluated


def main() -> None:
    script, adapters, args = parse(HeadScriptArguments, AdapterArguments, DraftHeadTrainingConfig)
    recipe = recipe_of(sys.argv, {**asdict(script), **asdict(adapters)})
    check_publishable(recipe, args, script.target_name or script.target)
    if adapters.use_peft and script.head is None:
        raise ValueError(
            "`use_peft` is set, but adapters need a head to start from. Pass `head`, or leave `use_peft` out."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    checkpoint = newest_checkpoint(Path(args.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(script.target)
    target = load_target(script.target, script.target_dtype, "cpu")
    check_context(target, script.max_length, f"`max_length` is {script.max_length}", "Lower `max_length`.")
    train, held_out = read_examples(script, tokenizer)
    # A checkpoint of adapters does not contain the head.
    start = script.head if adapters.use_peft else checkpoint or script.head
    head = make_head(script, start, target, tokenizer, train)
    earlier = script.head and training_prompts_of(script.head)
    to_train, to_evaluate = datasets_of(script, head, target, train, held_out)
    trainer = DraftHeadTrainer(head, target, args, to_train, to_evaluate, peft_config=adapters.config())
    timing = TimingCallback(checkpoint)
    trainer.add_callback(timing)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        resumed = newest_checkpoint(Path(args.output_dir)) or "the beginning"
        print(f"Stopped. Run the same command to resume from {resumed}.")
        sys.exit(130)
    evaluation = trainer.evaluate() if held_out else {}
    if not trainer.is_world_process_zero():
        return
    trainer.save_model()
    write_training_prompts(trainer.artefact_folder, first_questions(script), earlier=earlier or ())
    metrics = metrics_of(head, evaluation, args.tau_texts, train, len(held_out))
    metrics["training"] = training_facts(trainer, len(train), timing.seconds)
    write_run(trainer.artefact_folder, metrics, recipe, name=args.hub_model_id if args.push_to_hub else None)
    if args.push_to_hub:
        print(f"pushed: {trainer.push_to_hub()}")
    print(evaluation)


if __name__ == "__main__":
    main()
