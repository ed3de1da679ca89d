"""Warn before a run that is too small."""

import logging


logger = logging.getLogger(f"transformers.{__name__}")

MIN_USEFUL_TOKENS = 1_000_000

# Positions trained on -> tau of an 8-node tree, SmolLM2-135M-Instruct, its own outputs, Muon.
_MEASURED = ((150_000, 1.6), (390_000, 1.8), (560_000, 1.9))


def warn_if_small(tokens: int) -> bool:
    """Warn if a run over `tokens` positions, epochs included, is too small for a useful head; return whether it is."""
    if tokens >= MIN_USEFUL_TOKENS:
        return False
    measured = ", ".join(f"{tau} after {seen:,}" for seen, tau in _MEASURED)
    logger.warning(
        "This run sees %s positions, but a useful head needs about %s (tau of an 8-node tree on a 135M chat model was "
        "%s; plain decoding is 1). Use more conversations, best of all the target's own outputs "
        "(training/generate_dataset.py), rather than more epochs, which overfit.",
        f"{tokens:,}",
        f"{MIN_USEFUL_TOKENS:,}",
        measured,
    )
    return True
