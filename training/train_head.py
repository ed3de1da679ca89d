"""Train a draft head for a target.

    python training/train_head.py --config training/recipes/smollm2_135m_instruct.yaml

A run that was killed goes on with the same command: the newest checkpoint in `output_dir` is resumed.
"""

import hashlib
import json
import logging
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import set_seed
from trl import TrlParser

from transformers_resps import DraftHead
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
    save_head,
)


@dataclass
class HeadScriptArguments:
    """What is trained on what."""

    target: str = field(metadata={"help": "Hub id or folder of the model to draft for."})
    datasets: list[str] = field(metadata={"help": "JSON or JSONL files, or Hub ids, of conversations."})
    target_name: str | None = field(default=None, metadata={"help": "Name of the target to write into the head."})
    limits: list[int] = field(
        default_factory=list, metadata={"help": "Most conversations taken from each dataset; 0 for all."}
    )
    head: str | None = field(default=None, metadata={"help": "Head to start from; otherwise a fresh one."})
    draft_vocab_size: int = field(default=8192, metadata={"help": "Tokens a fresh head can propose; 0 for all."})
    max_length: int = field(default=512, metadata={"help": "Longest text in tokens; longer ones are cut."})
    eval_conversations: int = field(default=100, metadata={"help": "Conversations of the first dataset held out."})
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
    default_tree: list[int] = field(
        default_factory=lambda: [8, 4, 2],
        metadata={"help": "total_tokens, depth and top_k of the head's default tree."},
    )


def read_examples(script: HeadScriptArguments, tokenizer: Any) -> tuple[list[Example], list[Example], list[Example]]:
    """All texts, those to train on and those held out: of the first dataset, the ones whose hashes are lowest."""
    texts: list[list[Example]] = []
    for index, name in enumerate(script.datasets):
        limit = script.limits[index] if index < len(script.limits) else 0
        conversations = islice(load_conversations(name), limit or None)
        examples = make_examples(conversations, tokenizer, script.max_length)
        print(f"{name}: {len(examples)} texts, {sum(int(e.predicted.sum()) for e in examples)} assistant tokens")
        texts.append(examples)
    by_hash = sorted(texts[0], key=lambda e: hashlib.sha256(e.input_ids[:64].numpy().tobytes()).hexdigest())
    held_out = by_hash[: script.eval_conversations]
    excluded = {id(example) for example in held_out}
    everything = [example for part in texts for example in part]
    return everything, [example for example in everything if id(example) not in excluded], held_out


def make_head(script: HeadScriptArguments, target: PreTrainedModel, tokenizer: Any, texts: list[Example]) -> DraftHead:
    """The head to start from, in fp32: a given one or a fresh one with its vocabulary."""
    if script.head is not None:
        return DraftHead.from_pretrained(script.head, dtype=torch.float32)
    token_ids = None
    if script.draft_vocab_size:
        always = {i for i in [tokenizer.eos_token_id, *tokenizer.all_special_ids] if i is not None}
        vocabulary = choose_draft_vocabulary(texts, target.vocab_size, script.draft_vocab_size, always)
        print(f"draft vocabulary: {script.draft_vocab_size} tokens cover {vocabulary.coverage:.2%} of the answers")
        token_ids = vocabulary.token_ids
    head = DraftHead.from_target(
        target, draft_token_ids=token_ids, default_tree=script.default_tree, fc_norm=script.fc_norm
    ).float()
    if script.target_name is not None:
        head.config.target = {**(head.config.target or {}), "name_or_path": script.target_name}
    return head


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: `trainer_state.json` is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def main() -> None:
    parser = TrlParser((HeadScriptArguments, DraftHeadTrainingConfig))  # type: ignore[no-untyped-call]
    script, args = parser.parse_args_and_config()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.target)
    target = AutoModelForCausalLM.from_pretrained(script.target, dtype=script.target_dtype)
    context = target.config.get_text_config().max_position_embeddings
    if script.max_length > context:
        raise ValueError(
            f"`max_length` is {script.max_length}, but the target reads at most {context} tokens. Lower `max_length`."
        )
    everything, train, held_out = read_examples(script, tokenizer)
    head = make_head(script, target, tokenizer, train)

    train_set, held_out_set = ExampleDataset(train), ExampleDataset(held_out)
    if script.feature_cache_dir is not None:
        frozen = FrozenTarget(target, list(head.config.feature_layers or []))
        cached = CachedFeatures(everything, script.feature_cache_dir, frozen)
        train_set, held_out_set = cached.select(train), cached.select(held_out)
    trainer = DraftHeadTrainer(head, target, args, train_set, held_out_set if held_out else None)
    try:
        trainer.train(resume_from_checkpoint=newest_checkpoint(Path(args.output_dir)))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {newest_checkpoint(Path(args.output_dir)) or 'the beginning'}")
        sys.exit(130)
    metrics = trainer.evaluate() if held_out else {}
    save_head(trainer.model, Path(args.output_dir) / "head")
    if args.push_to_hub:
        trainer.push_to_hub()
    (Path(args.output_dir) / "head" / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(metrics)


if __name__ == "__main__":
    main()
