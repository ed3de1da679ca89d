"""What a head remembers of the target it was made for. Knows configs only: nothing of tensors or files."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def target_identity(target: PreTrainedModel) -> dict[str, Any]:
    """Name and sizes of `target`, as kept in `DraftHeadConfig.target`."""
    config = target.config.get_text_config()
    return {
        "name_or_path": target.config.name_or_path,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def check_is_model(target: Any) -> None:
    """Refuse a `target` that is no model.

    Raises:
        ValueError: names its type.
    """
    if not isinstance(getattr(target, "config", None), PreTrainedConfig):
        raise ValueError(
            f"`target` is a {type(target).__name__}, but must be the loaded model that the head drafts for. Pass what "
            "`AutoModelForCausalLM.from_pretrained` returns."
        )


def default_feature_layers(layer_count: int) -> list[int]:
    """EAGLE-3's low, middle and high hidden state, distinct and in range also for very shallow targets.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.1; which three they are is in its code alone
    (SafeAILab/EAGLE, `LlamaModel.forward`): layers 2, n // 2 and n - 3 of n.
    """
    last = max(layer_count - 1, 0)
    return sorted({min(2, last), layer_count // 2, max(layer_count - 3, 0)})
