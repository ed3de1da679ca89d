"""A first verdict soon, and better ones while more answers come."""

from collections.abc import Callable, Iterator

from transformers import PreTrainedModel

from ..heads import DraftHead
from .diagnosis import Diagnosis
from .labelled_text import LabelledText
from .probing import Probe


Source = Callable[[int, int, int], list[LabelledText]]

_LOOK_ANSWERS, _LOOK_TOKENS = 8, 48  # of the first look
_ROUND = 10  # answers between two verdicts


def refined(
    target: PreTrainedModel, head: DraftHead, source: Source, count: int, max_new_tokens: int
) -> Iterator[Diagnosis]:
    """Diagnose `head` on few and short answers, then on more and more long ones.

    Readings that the first look finds far worse are not followed further, and the short answers do not count later.

    Args:
        target: the model the head was made for.
        head: as loaded.
        source: gives the answers from one number up to another, with at most so many tokens of the target each.
        count: of all answers.
        max_new_tokens: of an answer.

    Yields:
        One diagnosis after another; it ends when more answers would change nothing, or after the last one.

    Raises:
        ValueError: the head belongs to another target, or fewer than two answers are long enough to score.
    """
    probe = Probe(target, head)
    if count > _LOOK_ANSWERS or max_new_tokens > _LOOK_TOKENS:
        probe.add(source(0, min(count, _LOOK_ANSWERS), min(max_new_tokens, _LOOK_TOKENS)))
        readings = None
        if probe.is_ready:
            look = probe.diagnosis()
            readings = look.worth_following
            yield look
        probe = Probe(target, head, readings)
    for start in range(0, count, _ROUND):
        end = min(start + _ROUND, count)
        probe.add(source(start, end, max_new_tokens))
        if probe.is_ready or end == count:
            found = probe.diagnosis()
            yield found
            if found.is_settled:
                return
