"""Check before any work that texts fit into what a target can read."""

from transformers import PreTrainedModel


def check_context(target: PreTrainedModel, tokens: int, needed: str, remedy: str) -> None:
    """Check that `tokens` positions fit into the target's context.

    Raises:
        ValueError: they do not; `needed` says what takes so many, `remedy` what to do.
    """
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ValueError(f"{needed}, but the target reads at most {context} tokens. {remedy}")
