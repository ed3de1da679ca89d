"""Read the prompts that a policy is made with, and split them by their hashes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers_resps.data import Conversation, load_conversations, to_tokens
from transformers_resps.trainers.data import name_of


if TYPE_CHECKING:
    from datasets import Dataset


def read_splits(
    dataset: str, tokenizer: Any, *, split: str, limit: int, held_out: float, max_prompt_tokens: int
) -> "tuple[Dataset, Dataset, Dataset]":
    """Load the first `limit` prompts that are short enough (all turns up to the last question), in three parts.

    Args:
        dataset: JSON or JSONL file, or Hub id, of conversations.
        tokenizer: of the target, with a chat template.
        split: of a dataset on the Hub.
        limit: 0 for all.
        held_out: share of the prompts, half of it watched and half tested.
        max_prompt_tokens: longer ones are left out.

    Returns:
        `messages` to learn from, to watch training by, and for the final figure; the hash of a prompt decides where
        it belongs, not its place in the dataset.

    Raises:
        ValueError: fewer than three are left.
    """
    found: dict[str, Conversation] = {}
    for turns in _prompts(dataset, split):
        tokens = to_tokens(turns, tokenizer)
        if len(tokens) <= max_prompt_tokens:
            found[name_of(tokens)] = turns
        if len(found) == (limit or -1):
            break
    if len(found) < 3:
        raise ValueError(
            f"{dataset} has {len(found)} prompts of at most {max_prompt_tokens} tokens, but three are needed: to "
            "learn from, to watch training by, and to see whether it helped. Pass a larger dataset, or raise "
            "--max_prompt_tokens."
        )
    ordered = [{"messages": found[name]} for name in sorted(found)]
    half = min(max(1, round(held_out * len(ordered) / 2)), (len(ordered) - 1) // 2)
    parts = (ordered[2 * half :], ordered[half : 2 * half], ordered[:half])
    from datasets import Dataset  # of the extra `train`, which the scripts have asked for

    train, watched, tested = map(Dataset.from_list, parts)
    return train, watched, tested


def _prompts(dataset: str, split: str) -> Iterator[Conversation]:
    for conversation in load_conversations(dataset, split):
        asked = [place for place, message in enumerate(conversation) if message["role"] == "user"]
        if asked:
            yield conversation[: asked[-1] + 1]


@dataclass
class PromptArguments:
    """The target, its drafter, and the prompts that it answers."""

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

    def read_prompts(self, tokenizer: Any) -> "tuple[Dataset, Dataset, Dataset]":
        """Load the three parts; see `read_splits`."""
        return read_splits(
            self.dataset,
            tokenizer,
            split=self.dataset_split,
            limit=self.limit,
            held_out=self.held_out,
            max_prompt_tokens=self.max_prompt_tokens,
        )
