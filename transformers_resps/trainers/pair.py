"""The target and the head that a policy is trained with, loaded if they are given by name."""

from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compat import unwrapped
from ..generation.attach import attach
from ..head import DraftHead, pair_identity
from .checks import check_kinds
from .loading import holds_head, load_target, load_tokenizer
from .policy_config import PolicyTrainingConfig


@dataclass(frozen=True, slots=True)
class Pair:
    """An attached target, its head, and the target's tokenizer."""

    target: Any
    head: DraftHead
    tokenizer: PreTrainedTokenizerBase

    @property
    def identity(self) -> dict[str, Any]:
        """Of `target` and `head`: what a policy is trained for."""
        return pair_identity(self.target, self.head)

    @classmethod
    def of(
        cls, target: PreTrainedModel | str, head: DraftHead | str, tokenizer: Any, args: PolicyTrainingConfig
    ) -> "Pair":
        """Load what is given by name, and attach the target.

        Args:
            target: a model, attached or not; or its folder or Hub id, which is loaded to the device of `args`.
            head: of that target; or its folder or Hub id.
            tokenizer: the target's; `None` loads it from where the target came from.
            args: of the trainer.

        Raises:
            ValueError: one of them is something else, or they do not fit together.
        """
        model: Any = attach(load_target(target, cast(Any, args.target_init_kwargs)))
        if isinstance(target, str):
            model.to(args.device)
        drafts, reads = _head(head, model), load_tokenizer(model, tokenizer)
        if reads is None:
            raise ValueError(
                f"There is no tokenizer where the target came from ({model.config.name_or_path or 'nowhere'}), but "
                "prompts are text. Pass it as `processing_class`."
            )
        return cls(model, drafts, reads)


def _head(head: Any, target: Any) -> DraftHead:
    if isinstance(head, str):
        if not holds_head(head):
            raise ValueError(
                f"`head` is {head!r}, which holds no draft head. Pass the folder or Hub id of the target's head; "
                "docs/train-a-head.md tells how to make one."
            )
        return DraftHead.from_pretrained(head, target=target)
    check_kinds("PolicyTrainer", head=(unwrapped(head), DraftHead))
    unwrapped(head).check_target(target)
    return head.eval()  # type: ignore[no-any-return]  # a head may be wrapped by PEFT
