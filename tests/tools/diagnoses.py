"""One verdict over all answers at once."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from transformers_resps.drafting import TrainableSource
from transformers_resps.tools.diagnosis import Diagnosis
from transformers_resps.tools.doctor import LabelledText, Probe


def diagnose(target: PreTrainedModel, head: TrainableSource, answers: Sequence[LabelledText]) -> Diagnosis:
    probe = Probe(target, head, has_images=any(answer.shown for answer in answers))
    probe.add(answers)
    return probe.diagnosis()
