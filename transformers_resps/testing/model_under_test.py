"""Call `generate` on the model under test, plainly and with a head and a policy, and leave it as it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..compat import unwrapped
from ..generation.attach import attach, detach, detached
from ..generation.defaults import SpeculationDefaults
from ..generation.evaluation_mode import EvaluationMode
from ..generation.mixin import ReSpSGenerationMixin
from ..generation.sequences import end_ids, left_padded, up_to_end
from ..head import DraftHead
from ..policy import Policy
from ..telemetry.report import SpeculationReport


@dataclass(frozen=True, slots=True)
class Written:
    """What a call of `generate` wrote.

    Attributes:
        answers: `[t]` of each prompt, up to its first end token.
        generated: `[b, t]` all tokens after the prompts, padding included.
        random_state: of the generator that draws, afterwards.
    """

    answers: list[Tensor]
    generated: Tensor
    random_state: Tensor


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """A model, and the head and policy whose output must be the model's own.

    Attributes:
        model: as the user holds it, perhaps with an adapter around it.
        head: `None` to draft by lookup alone.
        policy: as `generate` takes it.
        done: called after each call with the policy, to move a progress bar.
    """

    model: Any
    head: DraftHead | None
    policy: Policy | str | None
    done: Callable[[], Any] = lambda: None

    @property
    def target(self) -> PreTrainedModel:
        """The model that `generate` runs on."""
        return cast(PreTrainedModel, unwrapped(self.model))

    def plain(self, prompts: Sequence[Tensor], seed: int = 0, **settings: Any) -> Written:
        """Call stock `generate` of the detached model, for prompts `[s]`."""
        with detached(self.model):
            torch.manual_seed(seed)
            return self._written(self._generate(prompts, **settings).sequences, prompts)

    def speculative(
        self, prompts: Sequence[Tensor], seed: int = 0, **settings: Any
    ) -> tuple[Written, SpeculationReport]:
        """The same call with the head and the policy."""
        attach(self.model)
        torch.manual_seed(seed)
        output = self._generate(prompts, assistant_model=self.head, policy=self.policy, **settings)
        self.done()
        return self._written(output.sequences, prompts), output.speculation

    def pick(self, text: Tensor, **settings: Any) -> int:
        """What plain decoding writes after `text` `[s]`, from the random generator's present state, which stays."""
        with detached(self.model), self._forked():
            sequences = self._generate([text], **settings | {"max_new_tokens": 1}).sequences
        return int(sequences[0, -1])

    def _written(self, sequences: Tensor, prompts: Sequence[Tensor]) -> Written:
        generated, ends = sequences[:, max(len(prompt) for prompt in prompts) :], end_ids(self.target)
        on_gpu = self.target.device.type == "cuda"
        drawn = torch.cuda.get_rng_state(self.target.device) if on_gpu else torch.get_rng_state()
        return Written([up_to_end(row, ends) for row in generated], generated, drawn)

    def _generate(self, prompts: Sequence[Tensor], **settings: Any) -> Any:
        """One call; prompts of unequal lengths are padded on the left."""
        ids, mask = left_padded(prompts)
        return self.model.generate(
            input_ids=ids.to(self.target.device),
            attention_mask=mask.to(self.target.device),
            pad_token_id=0,
            return_dict_in_generate=True,
            **settings,
        )

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Afterwards the model is as it was before, and so is the global random generator."""
        was_attached = isinstance(self.target, ReSpSGenerationMixin)
        try:
            with self._forked(), SpeculationDefaults.suspended(), EvaluationMode().held(self.model):
                yield
        finally:
            if not was_attached:
                detach(self.model)

    @contextmanager
    def without_settings(self) -> Iterator[None]:
        """Inside, the model's own generation settings do not hold: no processor, no end token."""
        holders = [self.target] if self.model is self.target else [self.target, self.model]  # PEFT hands its own on
        kept = [holder.generation_config for holder in holders]
        for holder in holders:
            holder.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for holder, settings in zip(holders, kept, strict=True):
                holder.generation_config = settings

    def _forked(self) -> Any:
        """Random numbers drawn inside are not missing outside."""
        device = self.target.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
