"""What a policy is trained and judged on: prompts, the target's answers to them, and what steps cost."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ..calibration.cost_table import CostTable
from ..generation.sampling import sampling
from ..head import parameter_fingerprint
from ..policy import ActionGrid
from ..replay import OutcomeTable, RecordedText, ReplayText
from .live_rollouts import LiveRollouts
from .measured_costs import measured_costs
from .pair import Pair
from .policy_config import PolicyTrainingConfig
from .policy_prompts import PolicyPrompts
from .recording import Form, Recorded, Recorder, digest, outcomes_for, pools_of
from .rollouts import ReplayRollouts


_USUAL_CONTEXT = 256  # positions, where there are no prompts yet


class PolicyData:
    """The prompts of a trainer by the names of its arguments; answers and costs are made when they are first needed.

    Args:
        pair: answers, and is measured.
        args: where and how.

    Attributes:
        prompts: name of a dataset -> its prompts.
    """

    def __init__(self, pair: Pair, args: PolicyTrainingConfig) -> None:
        self.pair, self.prompts = pair, dict[str, PolicyPrompts]()
        self._args = args
        self._replays: dict[str, ReplayRollouts] = {}
        self._texts: dict[str, list[RecordedText]] = {}

    def add(self, name: str, dataset: Any) -> None:
        """Read a dataset; one of the same name is replaced.

        Raises:
            ValueError: it is no dataset of prompts, or one is too long for the target.
        """
        prompts = PolicyPrompts.of(dataset, name, self.pair.tokenizer)
        prompts.check_context(self.pair.target, self._args.max_completion_length, name)
        self.prompts[name] = prompts
        self._replays.pop(name, None)
        self._texts.pop(name, None)

    @cached_property
    def costs(self) -> CostTable:
        """What steps cost on this machine."""
        return measured_costs(self.pair, self._args)

    @property
    def usual_context(self) -> int:
        """Positions in the middle of the answer to a prompt of middle length."""
        lengths = sorted(len(tokens) for prompts in self.prompts.values() for tokens in prompts.tokens)
        return lengths[len(lengths) // 2] + self._args.max_completion_length // 2 if lengths else _USUAL_CONTEXT

    @property
    def first_questions(self) -> set[str]:
        """Of all prompts that a policy is trained on or chosen by."""
        return {one for name in ("train_dataset", "eval_dataset") for one in self._questions_of(name)}

    def _questions_of(self, name: str) -> set[str]:
        return self.prompts[name].first_questions if name in self.prompts else set()

    def learned(self, name: str) -> int:
        """How many prompts of a dataset are in `train_dataset`, too."""
        learned = self.prompts.get("train_dataset")
        return 0 if learned is None else len({*self.prompts[name].names} & {*learned.names})

    def replays(self, name: str, grid: ActionGrid) -> ReplayRollouts:
        """The outcome of every shape of `grid` at every position of the answers."""
        if name not in self._replays:
            texts: list[ReplayText] = self._record(name, outcomes_for(grid))
            self._replays[name] = ReplayRollouts(OutcomeTable([text.outcomes(grid, self.costs) for text in texts]))
        return self._replays[name]

    def texts(self, name: str, depths: dict[int, int]) -> list[RecordedText]:
        """The answers with the pools of `depths`."""
        if name not in self._texts:
            self._texts[name] = self._record(name, pools_of(depths))
        return self._texts[name]

    def live(self) -> LiveRollouts:
        """Decoding of the training prompts."""
        prompts, includes = self.prompts["train_dataset"], self._args.reward_includes_drafting
        return LiveRollouts(
            self.pair.target, self.pair.head, prompts.tokens, includes_drafting=includes, **self._generation
        )

    def facts(self, grid: ActionGrid) -> dict[str, str]:
        """Hashes of what a policy over `grid` learns from: a checkpoint is resumed only with the same."""
        longest = max(prompts.longest for prompts in self.prompts.values())
        seconds = [[self.costs.step_seconds(shape, context) for shape in grid.shapes] for context in (0, longest)]
        return {
            "target": parameter_fingerprint(self.pair.target),
            "head": self.pair.head.fingerprint(),
            "prompts": digest([prompts.names for prompts in self.prompts.values()]),
            "shapes": digest(grid.to_list()),
            "costs": digest(seconds),
        }

    @property
    def _generation(self) -> dict[str, Any]:
        return {"max_new_tokens": self._args.max_completion_length, **sampling(self._args.temperature)}

    def _record(self, name: str, form: Form[Recorded]) -> list[Recorded]:
        folder = Path(str(self._args.output_dir)) / "replay"
        recorder = Recorder(self.pair.target, self.pair.head, form, folder, self._generation)
        return recorder.record(self.prompts[name].tokens, name)
