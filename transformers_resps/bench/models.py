"""Load the models of a benchmark, and check that they fit together."""

from dataclasses import dataclass
from typing import Any, Self, cast

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..data import training_prompts_of
from ..generation.attach import attach
from ..heads import DraftHead
from ..heads.identity import parameter_fingerprint
from ..policies import Policy
from ..verifying.prepacking import is_prepacked, prepack
from .config import BenchConfig
from .policies import load_policies
from .provenance import config_sha256, weights_sha256


@dataclass(frozen=True, slots=True)
class BenchModels:
    """A target, its head, policies and perhaps a draft model, which fit together.

    Attributes:
        target: attached.
        tokenizer: of the target.
        head: in the target's dtype, on its device.
        policies: name in the table -> policy, or "auto".
        draft_model: for Transformers' assisted generation.
        identity: JSON values: ids, parameters and hashes.
        trained_on: fingerprints of prompts that head or policies learned from; `None` where they were not kept.
    """

    target: Any
    tokenizer: Any
    head: DraftHead
    policies: dict[str, Policy | str]
    draft_model: PreTrainedModel | None
    identity: dict[str, Any]
    trained_on: dict[str, set[str] | None]

    @classmethod
    def load(cls, config: BenchConfig) -> Self:
        """Load what `config` names.

        Raises:
            ValueError: something is not there, or does not fit the target.
        """
        target = attach(load_target(config.target, config.dtype, config.device, packed=config.pack))
        tokenizer = AutoTokenizer.from_pretrained(config.target)
        head = DraftHead.from_pretrained(config.head, target=target)
        policies = load_policies(config.policies, target, head)
        small = None if config.draft_model is None else load_draft_model(config.draft_model, target)
        named = dict(zip(policies, config.policies, strict=True))
        sources = {"head": config.head} | {name: source for name, source in named.items() if source != "auto"}
        identity = {
            "target": config.target,
            "packed": is_prepacked(target),
            "target_parameters": target.num_parameters(),
            "target_fingerprint": parameter_fingerprint(target),
            "head": config.head,
            "policies": named,
            "draft_model": config.draft_model,
            "weights_sha256": {name: weights_sha256(source) for name, source in sources.items()},
            "config_sha256": {name: config_sha256(source) for name, source in sources.items()},
        }
        trained_on = {name: training_prompts_of(source) for name, source in sources.items()}
        return cls(target, tokenizer, head, policies, small, identity, trained_on)


def load_target(name: str, dtype: str | None, device: str, *, packed: bool = False) -> Any:
    """Load a target onto its device; without a dtype in float32 on a CPU, and elsewhere in its own."""
    chosen = dtype or ("float32" if device == "cpu" else "auto")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    return prepack(model.to(device)) if packed else model.to(device)


def load_draft_model(name: str, target: Any) -> PreTrainedModel:
    """Load a small model for Transformers' assisted generation.

    Raises:
        ValueError: it has another vocabulary than the target.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype)
    own, other = (m.config.get_text_config().vocab_size for m in (model, target))
    if own != other:
        raise ValueError(
            f"The draft model {name} has a vocabulary of {own} tokens, the target one of {other}. Pass a small model "
            "of the target's family."
        )
    return cast(PreTrainedModel, model.to(target.device))
