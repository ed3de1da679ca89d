"""Train a draft head for a target.

    python training/train_head.py --config training/recipes/smollm2_135m_instruct.yaml

A run that was killed goes on with the same command: the newest checkpoint in `output_dir` is resumed, and
Ctrl-C writes one.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import set_seed
from trl import TrlParser

from transformers_resps import DraftHead
from transformers_resps.bench.provenance import machine
from transformers_resps.bench.subjects import training_prompts_of
from transformers_resps.publishing import head_metrics, recipe_of, write_run
from transformers_resps.trainers import (
    CachedFeatures,
    DraftHeadTrainer,
    DraftHeadTrainingConfig,
    Example,
    ExampleDataset,
    FrozenTarget,
    choose_draft_vocabulary,
    load_conversations,
    make_examples,
    split_examples,
    vocabulary_of,
)
from transformers_resps.trainers.checkpoints import newest_checkpoint
from transformers_resps.trainers.stopwatch import Stopwatch
from transformers_resps.trainers.training_prompts import write_training_prompts


@dataclass
class HeadScriptArguments:
    """What is trained on what."""

    target: str = field(metadata={"help": "Hub id or folder of the model to draft for."})
    datasets: list[str] = field(
        metadata={"help": "JSON or JSONL files, or Hub ids (`owner/name` or `owner/name:config`), of conversations."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the datasets from the Hub."})
    target_name: str | None = field(default=None, metadata={"help": "Name of the target to write into the head."})
    limits: list[int] = field(
        default_factory=list, metadata={"help": "Most conversations taken from each dataset; 0 for all."}
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "Head to go on from, in any published format; it keeps its draft vocabulary, layers and norms. "
            "Without it a fresh one. A checkpoint in `output_dir` wins over it."
        },
    )
    draft_vocab_size: int = field(default=8192, metadata={"help": "Tokens a fresh head can propose; 0 for all."})
    max_length: int = field(default=512, metadata={"help": "Longest text in tokens; longer ones are cut."})
    eval_share: float = field(
        default=0.03,
        metadata={"help": "Share of all prompts never trained on: the same ones, whatever is added to `datasets`."},
    )
    eval_conversations: int = field(
        default=100, metadata={"help": "Most held-out texts of the first dataset to evaluate; 0 trains on all."}
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Keep the target's features there and read them in every epoch."}
    )
    target_dtype: str = field(default="auto", metadata={"help": "A torch dtype name, or auto."})
    fc_norm: bool = field(
        default=True,
        metadata={
            "help": "Normalise each feature layer of a fresh head (EAGLE-3.1): deep layers are often 20 times larger."
        },
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of a fresh head's MLP; the target's own when left out."}
    )
    default_tree: list[int] | None = field(
        default=None,
        metadata={"help": "total_tokens, depth and top_k of the head's default tree; else its own, 8 4 2 if fresh."},
    )
    card: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "What a card must tell and no run can know: see docs/publish.md."},
    )


@dataclass
class AdapterArguments:
    """Adapters instead of the whole head, under the names that TRL's scripts use."""

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on `head`; they are merged into what is written."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of their inputs that is left out in training."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Layers of the head that get one."},
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


def load_target(script: HeadScriptArguments) -> PreTrainedModel:
    """The target, if it can read texts of `max_length` tokens."""
    target = AutoModelForCausalLM.from_pretrained(script.target, dtype=script.target_dtype)
    context = target.config.get_text_config().max_position_embeddings
    if script.max_length > context:
        raise ValueError(
            f"`max_length` is {script.max_length}, but the target reads at most {context} tokens. Lower `max_length`."
        )
    return target


def read_examples(script: HeadScriptArguments, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """The texts to train on, and those of the first dataset to evaluate."""
    train: list[Example] = []
    held_out: list[Example] = []
    for index, name in enumerate(script.datasets):
        limit = script.limits[index] if index < len(script.limits) else 0
        conversations = islice(load_conversations(name, script.dataset_split), limit or None)
        examples = make_examples(conversations, tokenizer, script.max_length)
        kept, others = split_examples(examples, script.eval_share if script.eval_conversations else 0.0)
        train += kept
        held_out = held_out if index else others[: script.eval_conversations]
        tokens = sum(int(example.predicted.sum()) for example in kept)
        print(f"{name}: {len(kept)} texts with {tokens} assistant tokens to train on, {len(others)} held out")
    return train, held_out


def first_questions(script: HeadScriptArguments) -> Iterator[str]:
    """What the conversations ask first, held-out ones too."""
    for index, name in enumerate(script.datasets):
        limit = script.limits[index] if index < len(script.limits) else 0
        for conversation in islice(load_conversations(name, script.dataset_split), limit or None):
            yield from [message["content"] for message in conversation if message["role"] == "user"][:1]


def make_head(
    script: HeadScriptArguments, start: str | None, target: PreTrainedModel, tokenizer: Any, texts: list[Example]
) -> DraftHead:
    """The head in `start`, or a fresh one with a vocabulary counted from `texts`; in fp32."""
    if start is not None:
        head = DraftHead.from_pretrained(start, target=target, dtype=torch.float32)
        vocabulary = vocabulary_of(head, texts)
        print(f"going on from {start}")
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
    """What the run took, over all the times it was resumed."""
    facts = {"steps": trainer.state.global_step, "texts": texts, "epochs": round(trainer.state.epoch or 0.0, 3)}
    if seconds is not None:
        facts["minutes"] = round(seconds / 60, 1)
    where = machine(trainer.target.model)
    return {**facts, "dtype": "bfloat16" if trainer.args.bf16 else "float32", "device": where["device"]}


def metrics_of(
    head: DraftHead, evaluation: dict[str, Any], tau_texts: int, train: list[Example], held_out: int
) -> dict[str, Any]:
    """What `metrics.json` holds of a head: how good it is."""
    tree = str(replace(head.default_shape, lookup=0))  # what `simulated_tau` drafts
    return {
        **head_metrics(evaluation, tree, held_out, tau_texts),
        "draft_vocab_size": head.config.draft_rows,
        "coverage": vocabulary_of(head, train).coverage,
    }


def datasets_of(
    script: HeadScriptArguments,
    head: DraftHead,
    target: PreTrainedModel,
    train: list[Example],
    held_out: list[Example],
) -> tuple[Any, Any]:
    """To train on and to evaluate; `None` for the latter where nothing is held out."""
    if script.feature_cache_dir is None:
        return ExampleDataset(train), ExampleDataset(held_out) if held_out else None
    frozen = FrozenTarget(target, list(head.config.feature_layers or []))
    evaluated = CachedFeatures(held_out, script.feature_cache_dir, frozen) if held_out else None
    return CachedFeatures(train, script.feature_cache_dir, frozen), evaluated


def main() -> None:
    parser = TrlParser((HeadScriptArguments, AdapterArguments, DraftHeadTrainingConfig))  # type: ignore[no-untyped-call]
    script, adapters, args = parser.parse_args_and_config()
    recipe = recipe_of(sys.argv, {**asdict(script), **asdict(adapters)}, is_pushed=args.push_to_hub)
    if adapters.use_peft and script.head is None:
        raise ValueError(
            "`use_peft` is set, but adapters need a head that drafts already. Pass `head`, or train whole."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    checkpoint = newest_checkpoint(Path(args.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(script.target)
    target = load_target(script)
    train, held_out = read_examples(script, tokenizer)
    # A checkpoint of adapters holds nothing else.
    start = script.head if adapters.use_peft else checkpoint or script.head
    head = make_head(script, start, target, tokenizer, train)
    earlier = script.head and training_prompts_of(script.head)
    to_train, to_evaluate = datasets_of(script, head, target, train, held_out)
    trainer = DraftHeadTrainer(head, target, args, to_train, to_evaluate, peft_config=adapters.config())
    stopwatch = Stopwatch(checkpoint)
    trainer.add_callback(stopwatch)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {newest_checkpoint(Path(args.output_dir)) or 'the beginning'}")
        sys.exit(130)
    evaluation = trainer.evaluate() if held_out else {}
    if not trainer.is_world_process_zero():
        return
    trainer.save_artefact()
    write_training_prompts(trainer.artefact_folder, first_questions(script), earlier=earlier or ())
    metrics = metrics_of(head, evaluation, args.tau_texts, train, len(held_out))
    metrics["training"] = training_facts(trainer, len(train), stopwatch.seconds)
    write_run(trainer.artefact_folder, metrics, recipe, name=args.hub_model_id if args.push_to_hub else None)
    if args.push_to_hub:
        print(f"pushed: {trainer.push_to_hub()}")
    print(evaluation)


if __name__ == "__main__":
    main()
