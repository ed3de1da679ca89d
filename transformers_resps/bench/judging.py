"""Checks that every text is the one that plain decoding wrote."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..testing import explain_divergence
from .methods import Method
from .prompts import Prompt
from .runs import Run
from .timing import PLAIN


class Judge:
    """Compares the answers to each prompt with the plain one.

    Attributes:
        same_text: method -> answers of the first repeat that are equal.
        unexplained: differences that should not be. Greedy ones that rounding does not explain; sampled ones in
            float32 or float64 of a method that promises the plain text seed for seed. In half precisions a sampled
            text may differ from a near-tie on, which cannot be told afterwards: it is counted, not judged.
    """

    def __init__(self, model: Any, methods: Sequence[Method]) -> None:
        self._model = model
        self._promises = {method.name for method in methods if method.seed_exact}
        self.same_text: Counter[str] = Counter({method.name: 0 for method in methods})
        self.unexplained: list[str] = []

    def add(self, prompt: Prompt, runs: Sequence[Run]) -> None:
        """Judge all answers of one cell."""
        plain = next(run for run in runs if run.timing.method == PLAIN)
        for run in runs:
            m = run.timing
            same = run.token_ids.tolist() == plain.token_ids.tolist()
            if m.repeat == 0:
                self.same_text[m.method] += same
            found = None if same else self._difference(prompt, plain, run)
            if found is not None:
                self.unexplained.append(
                    f"{m.method}, {m.prompt}, turn {m.turn}, temperature {m.temperature:g}, repeat {m.repeat}, {found}"
                )

    def _difference(self, prompt: Prompt, plain: Run, run: Run) -> str | None:
        if run.timing.temperature == 0:
            found = explain_divergence(self._model, prompt.input_ids, plain.token_ids, run.token_ids)
            return None if found is None or found.explained else str(found)
        exact = self._model.dtype in (torch.float32, torch.float64)
        if run.timing.method in self._promises and exact:
            return "sampled another text than plain decoding with the same seed"
        return None
