"""The most that can be gained: by the best fixed shape, and by the fastest sequence of shapes (the oracle).

Both come from replaying texts that the target wrote, with the cost table of this machine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_resps import CostTable, DraftHead, TreeShape
from transformers_resps.generation.output import sampling
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.replay import OutcomeTable, RankedText, depths_of, record_pools
from transformers_resps.tools.results import AnswerTiming


ORACLE = "oracle (ceiling)"
_LOOKUPS = (0, 4, 8)


@dataclass(frozen=True, slots=True)
class Replayer:
    """Replays texts of one target and head.

    Args:
        target: attached.
        head: drafts from every position of a text.
        grid: the shapes that are considered.
        costs: of steps, ours and plain decoding's.
        max_new_tokens: of an answer.
    """

    target: Any
    head: DraftHead
    grid: ActionGrid
    costs: CostTable
    max_new_tokens: int

    def replay(self, prompt: Tensor, answer: Tensor) -> OutcomeTable | None:
        """Find what every shape would have done at every position; `None` for an answer of fewer than two tokens."""
        if len(answer) < 2:
            return None
        text = torch.cat([prompt.cpu(), answer.cpu()])
        spare = self.max_new_tokens - len(answer)
        depths = depths_of(self.grid)
        pools = record_pools(self.target, self.head, text, len(prompt), depths=depths, spare_room=spare)
        return OutcomeTable([RankedText.from_recording(pools).outcomes(self.grid, self.costs)])

    def answer(self, prompt: Tensor, temperature: float) -> Tensor:
        """Return the target's own answer `[t]` to a prompt `[s]`, decoded with trees, which is faster."""
        inputs = prompt[None].to(self.target.device)
        torch.manual_seed(0)
        sequences = self.target.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            assistant_model=self.head,
            policy="auto",
            max_new_tokens=self.max_new_tokens,
            **sampling(temperature),
        )
        return sequences[0, len(prompt) :].cpu()  # type: ignore[no-any-return]

    def find_best_fixed(self, prompts: Iterable[tuple[str, Tensor]], temperature: float) -> dict[str, Any]:
        """Find the fastest shape over all of these prompts, holding one at a time in memory.

        Raises:
            ValueError: no prompt was answered with two tokens or more.
        """
        totals, names = torch.zeros(len(self.grid), dtype=torch.float64), []
        for name, prompt in prompts:
            table = self.replay(prompt, self.answer(prompt, temperature))
            if table is not None:
                totals += table.fixed_seconds.sum(0)
                names.append(name)
        if not names:
            raise ValueError(
                "The best fixed tree cannot be found: no search prompt has an answer of two tokens or more. Pass "
                "another --search-dataset, or leave best-fixed out of --methods."
            )
        return choose_best_fixed(totals, self.grid, names)

    def ceiling(self, prompt: Tensor, answer: Tensor) -> float:
        """Return the seconds of the fastest sequence of shapes over those of plain decoding, prefill left out."""
        table = self.replay(prompt, answer)
        if table is None:
            return 1.0
        contexts = range(len(prompt) + 1, len(prompt) + len(answer))  # prefill gives the first token
        plain = sum(self.costs.plain_seconds(context) + self.costs.overhead for context in contexts)
        return float(table.best_seconds[0] / plain)


def choose_best_fixed(totals: Tensor, grid: ActionGrid, prompts: Sequence[str]) -> dict[str, Any]:
    """Choose the drafting shape with the least seconds; `totals` is `[a]`, for each shape of `grid`.

    Returns:
        `best_fixed` of the results: `shape`, `prompts`, its `expected_ratio` to plain decoding on these by the cost
        table, prefill left out, and how many shapes were `considered`.
    """
    plain = grid.shapes.index(TreeShape.plain())  # which is measured anyway
    best = min((action for action in range(len(grid)) if action != plain), key=lambda action: float(totals[action]))
    shape, gain = ActionGrid((grid[best],)).to_list()[0], float(totals[plain] / totals[best])
    return {"shape": shape, "prompts": list(prompts), "expected_ratio": gain, "considered": len(grid)}


def ceiling_of(plain: AnswerTiming, share: float) -> AnswerTiming:
    """Estimate the oracle's timing: prefill as measured, and a share of plain decoding's other time.

    Its forwards are not known: they count as plain decoding's.
    """
    seconds = plain.prefill_seconds + share * (plain.seconds - plain.prefill_seconds)
    return AnswerTiming(
        ORACLE, plain.prompt, plain.repeat, plain.tokens, plain.target_forwards, seconds, plain.turn,
        plain.temperature, plain.prefill_seconds,
    )  # fmt: skip


def shapes_for(device_type: str) -> ActionGrid:
    """Return a plain step, lookups, trees, and both together: small ones on a CPU, up to 60 nodes elsewhere."""
    trees = ActionGrid.small()
    if device_type != "cpu":
        trees = ActionGrid.from_bins((4, 8, 16, 32, 60), (2, 4, 6, 8), (1, 2, 4, 10))
    return trees.with_lookups(_LOOKUPS)
