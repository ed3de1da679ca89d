"""What a head drafts on existing texts, without a forward of the target: simulated tau, and a table of its drafts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..drafting import Committed, StepModel
from ..drafting.level_drafter import LevelDrafter
from ..policies.fixed import FixedPolicy
from ..replay import RecordedText, ReplayedStep, decode_again
from ..tree import TreeShape


@torch.no_grad()
def simulated_tau(model: StepModel, texts: Iterable[dict[str, Tensor]], shape: TreeShape) -> float:
    """Simulate tau, the mean acceptance length: tokens per target forward when `shape` is drafted at every step.

    Exact for texts that the target itself wrote, greedily or sampled.

    Args:
        model: what drafts for the target.
        texts: each with `input_ids` and `loss_mask` `[t]`, and `features` `[t, F]`. The last run of true `loss_mask`
            is the output, and its first token comes from prefill.
        shape: nodes, depth and width of every tree; its `lookup` is not simulated.

    Returns:
        Tau, at least 1; 1 without texts.
    """
    emitted = [step.accepted + 1 for text in texts for step in _decoded_again(model, text, shape)]
    return sum(emitted) / len(emitted) if emitted else 1.0


def _decoded_again(model: StepModel, text: dict[str, Tensor], shape: TreeShape) -> Iterator[ReplayedStep]:
    """The engine's own drafting over an output, with trees of `shape`; none is cut at the end."""
    tokens, features, begins = text["input_ids"], text["features"], _output_start(text)
    drafter = LevelDrafter(model, 1, None)
    if begins > 1:
        drafter.observe(Committed(tokens[None, :begins], features[None, : begins - 1]))
    known = RecordedText(tokens, begins, features[begins - 1 : len(tokens) - 2], {}, spare_room=shape.depth)
    return decode_again(known, FixedPolicy(replace(shape, lookup=0)), drafter)


def _output_start(text: dict[str, Tensor]) -> int:
    mask = text["loss_mask"]
    return 1 if mask.all() else int((~mask).nonzero()[-1]) + 1


_TOKENS = 32  # of the output that are drafted
_PROMPT_TOKENS = 24  # of the prompt that are shown


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """What the head drafted in one step, along the text and one token further."""

    accepted: list[int]  # tokens that the text follows
    rejected: int | None  # the token that the head thought likeliest after them, if it drafted one


@torch.no_grad()
def drafted_steps(model: StepModel, text: dict[str, Tensor], shape: TreeShape) -> list[DraftedStep]:
    """Decode the beginning of a text's output again; the arguments are those of `simulated_tau`."""
    begin = {name: tensor[: _output_start(text) + _TOKENS + 1] for name, tensor in text.items()}
    tokens, found = begin["input_ids"].tolist(), []
    for step in _decoded_again(model, begin, shape):
        tree, node = step.proposal.tree, 0
        (children,) = tree.children()
        *accepted, missed = tokens[step.root + 1 :][: step.accepted + 1]
        for token in accepted:
            node = children[node, token]
        others = [
            (float(tree.scores[0, child]), token)
            for (parent, token), child in children.items()
            if parent == node and token != missed
        ]
        found.append(DraftedStep(accepted, max(others)[1] if others else None))
    return found


def print_drafts(
    model: StepModel,
    texts: Sequence[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    shape: TreeShape,
    step: int,
) -> None:
    """Print prompt, output, drafts and tau of each text, as TRL prints completions; see `simulated_tau`."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    def words(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens)).replace("\n", "⏎")

    table = Table("Prompt", "Answer", "Head drafted", "Tau", header_style="bold", expand=True)
    table.columns[-1].justify = "right"
    for text in texts:
        begins, tokens = _output_start(text), text["input_ids"].tolist()
        steps = drafted_steps(model, text, shape)
        drafts: Any = Text()
        for one in steps:
            drafts.append("|" if drafts else "", "dim")
            drafts.append(words(one.accepted), "green")
            if one.rejected is not None:
                drafts.append(words([one.rejected]), "red strike")
        emitted = sum(len(one.accepted) + 1 for one in steps)
        table.add_row(
            Text(words(tokens[max(begins - _PROMPT_TOKENS, 0) : begins]), "yellow"),
            Text(words(tokens[begins : begins + _TOKENS])),
            drafts,
            f"{emitted / max(len(steps), 1):.2f}",
        )
        table.add_section()
    title = f"Step {step}: [green]accepted[/] and [red strike]rejected[/] tokens; | separates steps"
    Console().print(Panel(table, title=title))
