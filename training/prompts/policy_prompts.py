"""Read the prompts that a policy is made with, and split them by their hashes."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from runs.context import check_context
from transformers_resps.data import load_conversations, to_tokens


@dataclass(frozen=True)
class Prompts:
    """Split by their hashes, whatever their order.

    Attributes:
        train: `[s]` each, to learn from.
        watched: to watch training by.
        tested: for the final figure.
        first_questions: what the conversations of all three ask first.
    """

    train: list[Tensor]
    watched: list[Tensor]
    tested: list[Tensor]
    first_questions: set[str]

    @classmethod
    def read(
        cls, dataset: str, tokenizer: Any, *, split: str, limit: int, held_out: float, max_prompt_tokens: int
    ) -> "Prompts":
        """The first `limit` prompts that are short enough: all turns up to the last question.

        Args:
            dataset: JSON or JSONL file, or Hub id, of conversations.
            tokenizer: of the target, with a chat template.
            split: of a dataset on the Hub.
            limit: 0 for all.
            held_out: share of the prompts, half of it watched and half tested.
            max_prompt_tokens: longer ones are left out.

        Raises:
            ValueError: fewer than three are left.
        """
        first_questions: set[str] = set()
        found: dict[str, Tensor] = {}
        for conversation in load_conversations(dataset, split):
            asked = [i for i, message in enumerate(conversation) if message["role"] == "user"]
            if not asked:
                continue
            turns = conversation[: asked[-1] + 1]
            tokens = to_tokens(turns, tokenizer)
            if len(tokens) <= max_prompt_tokens:
                found[name_of(tokens)] = tokens
                first_questions.add(conversation[asked[0]]["content"])
            if len(found) == (limit or -1):
                break
        if len(found) < 3:
            raise ValueError(
                f"{dataset} has {len(found)} prompts of at most {max_prompt_tokens} tokens, but three are needed: to "
                "learn from, to watch training by, and to see whether it helped. Pass a larger dataset, or raise "
                "--max_prompt_tokens."
            )
        ordered = [found[name] for name in sorted(found)]
        half = min(max(1, round(held_out * len(ordered) / 2)), (len(ordered) - 1) // 2)
        return cls(ordered[2 * half :], ordered[half : 2 * half], ordered[:half], first_questions)

    def check_context(self, target: PreTrainedModel, max_new_tokens: int) -> None:
        """Check that the longest prompt leaves room for its answer.

        Raises:
            ValueError: it does not.
        """
        longest = max(len(prompt) for part in (self.train, self.watched, self.tested) for prompt in part)
        needed = f"The longest prompt has {longest} tokens and its answer up to {max_new_tokens}"
        remedy = "Lower --max_prompt_tokens or --max_new_tokens."
        check_context(target, longest + max_new_tokens, needed, remedy)


def name_of(tokens: Tensor) -> str:
    """A hash of token ids `[s]`."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


@dataclass
class PromptArguments:
    """Which target answers which prompts, and who drafts."""

    target: str = field(metadata={"help": "Hub id or folder of the model that decodes."})
    head: str = field(metadata={"help": "Hub id or folder of its draft head."})
    dataset: str = field(metadata={"help": "JSON or JSONL file, or Hub id, of conversations: their prompts are used."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset from the Hub."})
    target_dtype: str = field(default="auto", metadata={"help": "A torch dtype name, or auto."})
    pack: bool = field(default=False, metadata={"help": "With packed weights, as `resps bench --pack` will measure."})
    limit: int = field(default=200, metadata={"help": "Maximum number of prompts; 0 for all."})
    held_out: float = field(
        default=0.3,
        metadata={
            "help": "Share of the prompts not learned from: half to watch training by, half for the final figure."
        },
    )
    max_prompt_tokens: int = field(default=512, metadata={"help": "Longer prompts are left out."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of an answer in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Of the answers; 0 is greedy."})
    card: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "What a card must tell and no run can know: see docs/publish.md."},
    )

    def read_prompts(self) -> Prompts:
        """As asked for; see `Prompts.read`."""
        return Prompts.read(
            self.dataset,
            AutoTokenizer.from_pretrained(self.target),
            split=self.dataset_split,
            limit=self.limit,
            held_out=self.held_out,
            max_prompt_tokens=self.max_prompt_tokens,
        )
