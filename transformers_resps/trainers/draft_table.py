"""A table of what the head drafts on some texts while it is trained, like TRL's table of completions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..head import BoundHead
from ..policy import FixedPolicy
from ..replay import ReplayedStep, decode_again
from ..tree import TreeShape
from .simulated_decoding import after_prompt, output_start


_TOKENS = 32  # of the answer that are drafted
_PROMPT_TOKENS = 24  # of the prompt that are shown


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """What the head drafted in one step, along the text and one token further.

    Attributes:
        accepted: tokens that the text follows.
        rejected: the token that the head thought likeliest after them; `None` if it drafted none.
    """

    accepted: list[int]
    rejected: int | None


@torch.no_grad()
def drafted_steps(bound: BoundHead, text: dict[str, Tensor], shape: TreeShape) -> list[DraftedStep]:
    """Decode the beginning of a text's answer again with trees of `shape`.

    Args:
        bound: the head with what it borrows from its target.
        text: see `simulated_tau`.
        shape: of every tree; its `lookup` is not used.
    """
    begin = {name: tensor[: output_start(text) + _TOKENS + 1] for name, tensor in text.items()}
    known, generator = after_prompt(bound, begin, spare_room=shape.depth)
    policy = FixedPolicy(replace(shape, lookup=0))
    return [_drafted(step, known.input_ids) for step in decode_again(known, policy, generator)]


def _drafted(step: ReplayedStep, text: Tensor) -> DraftedStep:
    tree = step.proposal.tree
    accepted: list[int] = text[step.root + 1 :][: step.accepted].tolist()
    (children,), node = tree.children(), 0
    for token in accepted:
        node = children[node, token]
    next_ones = [
        (float(tree.scores[0, child]), token) for (parent, token), child in children.items() if parent == node
    ]
    missed = int(text[step.root + step.accepted + 1])
    rejected = [token for _, token in sorted(next_ones, reverse=True) if token != missed]
    return DraftedStep(accepted, rejected[0] if rejected else None)


class DraftTable:
    """Prints what a head drafts on the same few texts.

    Args:
        texts: see `simulated_tau`.
        tokenizer: the target's.
    """

    def __init__(self, texts: Sequence[dict[str, Tensor]], tokenizer: PreTrainedTokenizerBase) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    def print(self, bound: BoundHead, step: int) -> None:
        """Print prompts, answers, drafts and tau of each text.

        Args:
            bound: the head with what it borrows from its target.
            step: of the training.
        """
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        table = Table("Prompt", "Answer", "Head drafted", "Tau", header_style="bold", expand=True)
        table.columns[-1].justify = "right"
        for text in self._texts:
            table.add_row(*self._row(bound, text))
            table.add_section()
        title = f"Step {step}: [green]accepted[/] and [red strike]rejected[/] tokens; | separates steps"
        Console().print(Panel(table, title=title))

    def _row(self, bound: BoundHead, text: dict[str, Tensor]) -> tuple[Any, ...]:
        from rich.text import Text

        begins, tokens = output_start(text), text["input_ids"].tolist()
        steps = drafted_steps(bound, text, bound.head.default_shape)
        drafts = Text()
        for one in steps:
            drafts.append("|" if drafts else "", "dim")
            drafts.append(self._words(one.accepted), "green")
            if one.rejected is not None:
                drafts.append(self._words([one.rejected]), "red strike")
        emitted = sum(len(one.accepted) + 1 for one in steps)
        return (
            Text(self._words(tokens[max(begins - _PROMPT_TOKENS, 0) : begins]), "yellow"),
            Text(self._words(tokens[begins : begins + _TOKENS])),
            drafts,
            f"{emitted / max(len(steps), 1):.2f}",
        )

    def _words(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens)).replace("\n", "⏎")
