"""Why the rows of a batch may have to advance together.

A row may go its own way only if nothing that the call runs can tell: plain decoding shows every processor and
criterion all rows at once, at the same length. What is not known to treat each row by itself keeps them together.
"""

from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .attention import longrope_boundary


# By exact type, of Transformers' own module: a score depends on the row's own scores and its own text, and no call
# leaves anything behind. SynthID and classifier-free guidance keep a state, prefix constraints are told the row.
_PROCESSORS_BY_ROW = frozenset(
    f"{name}{kind}"
    for kind, names in {
        "LogitsProcessor": (
            *("MinLength", "MinNewTokensLength", "RepetitionPenalty", "NoRepeatNGram", "SequenceBias", "NoBadWords"),
            *("ForcedBOSToken", "ForcedEOSToken", "InfNanRemove", "SuppressTokensAtBegin", "SuppressTokens"),
            "Watermark",
        ),
        "LogitsWarper": ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta"),
        "": ("ExponentialDecayLengthPenalty", "LogitNormalization"),
    }.items()
    for name in names
)
_CRITERIA_BY_ROW = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})


def coupling(
    target: PreTrainedModel,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    asked: dict[str, bool],
) -> str | None:
    """What could tell whether the rows of this call are decoded together, or `None` when nothing can.

    Args:
        target: the model.
        logits_processor: of the call.
        stopping_criteria: of the call.
        asked: what the caller gets of all rows at once, by name; false where it is not asked for.
    """
    for processor in logits_processor:
        if not _is_stock(processor, _PROCESSORS_BY_ROW) or _ignores_prompts(processor):
            return f"the logits processor {type(processor).__name__}, which may look at all rows at once"
    for criterion in stopping_criteria:
        if not _is_stock(criterion, _CRITERIA_BY_ROW):
            return f"the stopping criterion {type(criterion).__name__}, which may look at all rows at once"
    kinds = {type(criterion).__name__ for criterion in stopping_criteria}
    if "EosTokenCriteria" not in kinds and kinds != {"MaxLengthCriteria"}:
        return "stopping criteria without an end token, after which finished rows go on"
    for name, is_asked in asked.items():
        if is_asked:
            return f"{name}, for all rows at once"
    if longrope_boundary(target.config) is not None:
        return "a target of rope_type 'longrope', whose frequencies depend on the longest row"
    return None


def advance_together(lockstep: bool | None, do_sample: bool, reason: str | None) -> bool:
    """Whether rows advance together.

    Args:
        lockstep: what the caller asks for; when `None`, greedy rows advance apart and sampled rows together, since
            plain sampling takes the random numbers of all rows at once.
        do_sample: whether tokens are drawn.
        reason: why they must, if they must.

    Raises:
        ValueError: the caller asks for rows that advance apart, and they must not.
    """
    if lockstep is False and reason is not None:
        raise ValueError(
            f"Got lockstep=False with {reason}, but rows advance each on its own only where nothing can tell. Leave "
            "out `lockstep`, or what keeps them together."
        )
    return reason is not None or (do_sample if lockstep is None else lockstep)


def _is_stock(part: object, names: frozenset[str]) -> bool:
    kind = type(part)
    return kind.__name__ in names and kind.__module__.startswith("transformers.generation.")


def _ignores_prompts(processor: object) -> bool:
    """Whether a repetition penalty has a prompt length for each row."""
    return not isinstance(getattr(processor, "prompt_ignore_length", None), int | None)
