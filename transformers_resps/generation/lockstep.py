"""Whether the rows of a batch advance in lockstep.

A batch may be ragged only if nothing in the call can notice: plain decoding shows every processor and criterion all
rows at once, at the same length. What is not known to treat each row separately requires lockstep.
"""

from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..decoding.tree_logits_processor import is_stateless
from ..target.attention import longrope_boundary


_CRITERIA_BY_ROW = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})


def lockstep_reason(
    target: PreTrainedModel,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    asked: dict[str, bool],
) -> str | None:
    """Say what in a call requires lockstep; `None` when nothing does.

    Args:
        target: the model.
        logits_processor: of the call.
        stopping_criteria: of the call.
        asked: name -> whether the caller asks for it; each is an output of all rows at once.
    """
    for processor in logits_processor:
        if not is_stateless(processor):
            return f"the logits processor {type(processor).__name__}, which may look at all rows at once"
    for criterion in stopping_criteria:
        if not _is_by_row(criterion):
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


def is_lockstep(lockstep: bool | None, do_sample: bool, reason: str | None) -> bool:
    """Decide whether the rows of a call advance in lockstep.

    Args:
        lockstep: what the caller asks for; with `None`, a greedy batch is ragged and a sampled one in lockstep, since
            plain sampling draws the random numbers of all rows at once.
        do_sample: whether tokens are drawn.
        reason: why they must, if they must.

    Raises:
        ValueError: the caller asks for a ragged batch where lockstep is required.
    """
    if lockstep is False and reason is not None:
        raise ValueError(f"`lockstep=False` does not work with {reason}. Leave out `lockstep`, or what requires it.")
    return reason is not None or (do_sample if lockstep is None else lockstep)


def _is_by_row(criterion: object) -> bool:
    kind = type(criterion)
    return kind.__name__ in _CRITERIA_BY_ROW and kind.__module__.startswith("transformers.generation.")
