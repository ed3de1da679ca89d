"""The table of kinds names what exists."""

import pytest

from transformers_resps.drafting import DraftSource, TrainableSource
from transformers_resps.drafting.kinds import CAUSAL, EAGLE, KINDS, DrafterKind, kind_of_files, kind_of_model
from transformers_resps.trainers.objectives import Objective


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_names_its_class_and_what_trains_and_unrolls_it(kind: DrafterKind) -> None:
    source = kind.source.load()
    assert issubclass(source, DraftSource) and source.__name__ == kind.name
    assert (kind.new is not None) is (kind.objective is not None) is issubclass(source, TrainableSource)
    if kind.objective is not None and kind.unroll is not None:
        assert issubclass(kind.objective.load(), Objective) and callable(kind.unroll.load())


def test_every_kind_is_known_by_what_it_saves_or_by_the_model_that_drafts() -> None:
    for kind in KINDS:
        assert not kind.saved_as or kind_of_files({"model_type": kind.saved_as}, {}) is kind
        assert all(kind_of_model(model_type) is kind for model_type in kind.loaded_as)
    assert kind_of_files({}, {}) is EAGLE and kind_of_model("llama") is CAUSAL
