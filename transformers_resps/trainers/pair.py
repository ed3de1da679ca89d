"""The target and the head that a policy is trained with, loaded if they are given by name."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..compat import unwrapped
from ..generation.attach import attach
from ..head import DraftHead, DraftHeadConfig, pair_identity


@dataclass(frozen=True, slots=True)
class Pair:
    """An attached target, its head, and the target's tokenizer."""

    target: Any
    head: DraftHead
    tokenizer: Any

    @property
    def identity(self) -> dict[str, Any]:
        """Of `target` and `head`: what a policy is trained for."""
        return pair_identity(self.target, self.head)

    @classmethod
    def of(
        cls, target: PreTrainedModel | str, head: DraftHead | str, tokenizer: Any, device: torch.device | str
    ) -> "Pair":
        """Load what is given by name, and attach the target.

        Args:
            target: a model, attached or not; or its folder or Hub id, which is loaded in its own dtype to `device`.
            head: of that target; or its folder or Hub id.
            tokenizer: the target's; `None` loads it from where the target came from.
            device: for a target that is loaded here.

        Raises:
            ValueError: one of them is something else, or they do not fit together.
        """
        model = _target(target, device)
        drafts = _head(head, model)
        return cls(model, drafts, _tokenizer(tokenizer, model))


def _target(target: Any, device: torch.device | str) -> Any:
    if isinstance(target, str):
        if _holds_head(target):
            raise ValueError(
                f"`target` is {target!r}, which is a draft head. Pass it as `head`, and the model that it drafts for "
                "as `target`."
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
        target = loaded.to(device)
    if not isinstance(unwrapped(target), PreTrainedModel) or isinstance(unwrapped(target), DraftHead):
        raise ValueError(
            f"`target` is a {type(target).__name__}, but must be the model that decodes, or its folder or Hub id. "
            "Load it with `AutoModelForCausalLM.from_pretrained`."
        )
    return attach(target)


def _head(head: Any, target: Any) -> DraftHead:
    if isinstance(head, str):
        if not _holds_head(head):
            raise ValueError(
                f"`head` is {head!r}, which holds no draft head. Pass the folder or Hub id of the target's head; "
                "docs/train-a-head.md tells how to make one."
            )
        return DraftHead.from_pretrained(head, target=target)
    if not isinstance(unwrapped(head), DraftHead):
        raise ValueError(
            f"`head` is a {type(head).__name__}, but must be a `DraftHead`, or its folder or Hub id. Load it with "
            "`DraftHead.from_pretrained(head_id, target=target)`."
        )
    unwrapped(head).check_target(target)
    return head.eval()  # type: ignore[no-any-return]  # a head may be wrapped by PEFT


def _holds_head(name: str) -> bool:
    """Whether a folder or repository holds a draft head, of ours or of another publisher.

    Raises:
        OSError: it is not there.
    """
    config, _ = PreTrainedConfig.get_config_dict(name)
    architectures = " ".join(config.get("architectures") or ())
    is_published = "draft_vocab_size" in config or "speculators_config" in config or "eagle" in architectures.lower()
    return config.get("model_type") == DraftHeadConfig.model_type or is_published


def _tokenizer(tokenizer: Any, target: Any) -> Any:
    """The tokenizer that was given, or the target's own.

    Raises:
        ValueError: it is another model's, or there is none.
    """
    source = target.config.name_or_path
    try:
        own = AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError, KeyError):  # no files of a tokenizer there
        own = None
    given = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if given is None and own is None:
        raise ValueError(
            f"There is no tokenizer where the target came from ({source or 'nowhere'}), but prompts are text. Pass "
            "`processing_class=AutoTokenizer.from_pretrained(target_id)`."
        )
    if given is None or own is None:
        return given or own
    known, used = own.get_vocab(), given.get_vocab()
    wrong = sorted(token for token in known if used.get(token) != known[token])
    if wrong:
        raise ValueError(
            f"`processing_class` is the tokenizer of another model: {len(wrong)} of the target's {len(known)} tokens "
            f"are missing or have another id there, such as {wrong[0]!r}. Pass the tokenizer of {source}."
        )
    return given
