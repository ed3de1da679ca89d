"""Say before a run what it can give. Knows numbers only."""

import logging


logger = logging.getLogger(f"transformers.{__name__}")

USEFUL_TOKENS = 1_000_000

# Positions trained on -> tau of an 8-node tree, SmolLM2-135M-Instruct, answers of its own, Muon (training/LOG.md).
_MEASURED = ((150_000, 1.6), (390_000, 1.8), (560_000, 1.9))


def warn_if_small(tokens: int) -> bool:
    """Log a warning if a run of `tokens` positions, epochs included, is too small for a useful head; say if it is."""
    if tokens >= USEFUL_TOKENS:
        return False
    measured = ", ".join(f"{tau} after {seen:,}" for seen, tau in _MEASURED)
    logger.warning(
        "This run sees %s positions, but a useful head needs about %s. Expect a tau near that of a run of this size "
        "(an 8-node tree gave %s on a 135M chat model; a plain step gives 1). Use more conversations, best of all the "
        "target's own answers (training/generate_dataset.py); further epochs over few texts teach them by heart.",
        f"{tokens:,}",
        f"{USEFUL_TOKENS:,}",
        measured,
    )
    return True
