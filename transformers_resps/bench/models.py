"""What is measured: a target, its head, the policies, perhaps a draft model. Loaded and checked against each other."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..data import TRAINING_PROMPTS, read_training_prompts
from ..generation.attach import attach
from ..head import DraftHead, pair_identity
from ..head.fingerprint import parameter_fingerprint
from ..policy import Policy
from ..target.prepacking import is_prepacked, prepack
from .methods import policy_name
from .policies import named_tree, read_policy
from .provenance import config_sha256, file_of, weights_sha256


logger = logging.getLogger(f"transformers.{__name__}")


@dataclass(frozen=True, slots=True)
class BenchModels:
    """All that is measured, loaded, and known to fit together.

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


def load_target(name: str, dtype: str | None, device: str, *, packed: bool = False) -> Any:
    """Load a target onto its device; without a dtype in float32 on a CPU, and elsewhere in its own."""
    chosen = dtype or ("float32" if device == "cpu" else "auto")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    return prepack(model.to(device)) if packed else model.to(device)


def load_models(
    target_name: str,
    head_name: str,
    policy_names: Sequence[str],
    *,
    draft_model: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    packed: bool = False,
) -> BenchModels:
    """Load everything.

    Raises:
        ValueError: something is not there, or does not fit the target.
    """
    target = attach(load_target(target_name, dtype, device, packed=packed))
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    head = DraftHead.from_pretrained(head_name, target=target)
    policies = load_policies(policy_names, target, head)
    small = None if draft_model is None else load_draft_model(draft_model, target)
    sources = {"head": head_name} | {
        name: source for name, source in zip(policies, policy_names, strict=True) if source != "auto"
    }
    identity = {
        "target": target_name,
        "packed": is_prepacked(target),
        "target_parameters": target.num_parameters(),
        "target_fingerprint": parameter_fingerprint(target),
        "head": head_name,
        "policies": dict(zip(policies, policy_names, strict=True)),
        "draft_model": draft_model,
        "weights_sha256": {name: weights_sha256(source) for name, source in sources.items()},
        "config_sha256": {name: config_sha256(source) for name, source in sources.items()},
    }
    trained_on = {name: training_prompts_of(source) for name, source in sources.items()}
    return BenchModels(target, tokenizer, head, policies, small, identity, trained_on)


def training_prompts_of(source: str) -> set[str] | None:
    """Fingerprints of the prompts that a head or policy learned from; `None`, and a warning, if they were not kept.

    Raises:
        ValueError: the file is damaged.
    """
    file = file_of(source, TRAINING_PROMPTS)
    if file is None:
        logger.warning(
            "%s has no %s, so it may have been trained on prompts that it will be measured on.",
            source,
            TRAINING_PROMPTS,
        )
        return None
    return read_training_prompts(file.parent)


def load_policies(names: Sequence[str], target: Any, head: DraftHead) -> dict[str, Policy | str]:
    """Name in the table -> policy.

    Raises:
        ValueError: there is no such policy, two have one name, or one was trained for another target or head.
    """
    found: dict[str, Policy | str] = {}
    for source in names:
        if named_tree(source) is not None:
            raise ValueError(
                f"`--policy {source}` is a tree, but `--policy` takes 'auto', folders or Hub ids. Pass `--shapes "
                f"{source}`."
            )
        policy = read_policy(source, head)
        if isinstance(policy, Policy) and policy.has_identity:
            policy.check_identity(**pair_identity(target, head))
        name = policy_name(source, policy)
        if name in found:
            raise ValueError(
                f"Two policies have the name {name!r}. Pass each policy once, and give their folders different names."
            )
        found[name] = policy
    return found


def load_draft_model(name: str, target: Any) -> PreTrainedModel:
    """A small model for Transformers' assisted generation.

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
