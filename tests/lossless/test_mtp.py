"""MTP layers draft for their targets, hybrid ones too: every tree gives the text of plain `generate`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from tests.assistants.mtp_cases import CASES
from tests.lossless.hybrids import SAMPLED, answer, check_counts, compare, padded, tokens
from tests.recurrent_targets import NEEDS_STATES, VOCABULARY
from transformers_resps import FixedPolicy, MtpHead, TreeShape, attach, detach
from transformers_resps.compilation import compiled


HYBRID = ["Qwen3.5", "Qwen3-Next"]
FAMILIES = [
    *(pytest.param(name, marks=NEEDS_STATES) for name in HYBRID),
    *("DeepSeek-V3", "GLM-4.6", "MiMo-7B", "MiMo-V2-Flash", "Step-3.5", "three chained"),
]


def attached(name: str, folder: Path) -> PreTrainedModel:
    """A target with its checkpoint in a folder."""
    case = next(case for case in CASES if case.name == name)
    case = replace(case, config=case.config | {"vocab_size": VOCABULARY, "eos_token_id": None})
    target = case.build()
    case.write(folder, target, case.raw())
    return attach(target)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return attached(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> MtpHead:
    return MtpHead.from_target(target)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return attached(HYBRID[0], tmp_path_factory.mktemp("hybrid"))


@NEEDS_STATES
def test_the_layers_that_came_with_a_model_are_named_by_a_word_and_loaded_once(
    hybrid: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [compare(hybrid, "mtp", tokens(9))]
    monkeypatch.setattr(MtpHead, "from_target", None)  # not again
    reports.append(compare(hybrid, "mtp", tokens(9, seed=1), policy="auto"))
    reports.append(compare(hybrid, None, padded(3), use_mtp=True))
    check_counts(*reports, in_a_row=1)


@NEEDS_STATES
def test_a_config_that_asks_for_the_layers_gets_trees_of_a_policy(
    hybrid: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answer(hybrid, padded(3))
    monkeypatch.setattr(hybrid.generation_config, "use_mtp", True)
    for config in (None, GenerationConfig()):  # the call's own config leaves the setting open
        found = answer(hybrid, padded(3), policy=FixedPolicy(TreeShape(8, 3, 2)), generation_config=config)
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert sum(step.drafted for step in found.speculation.steps)


@NEEDS_STATES
def test_saved_layers_are_known_by_their_folder(hybrid: PreTrainedModel, tmp_path: Path) -> None:
    MtpHead.from_target(hybrid).save_pretrained(tmp_path)
    check_counts(compare(hybrid, tmp_path, tokens(9)), in_a_row=1)
    attach(hybrid, assistant_model=str(tmp_path))
    assert answer(hybrid, tokens(9)).speculation.steps


@NEEDS_STATES
def test_stocks_own_keyword_stays_stocks_without_a_policy(hybrid: PreTrainedModel) -> None:
    detached = attach(detach(hybrid))
    with pytest.raises(ValueError, match="stateful|num_mtp_layers"):  # Transformers' words, before 5.25 and since
        answer(detached, tokens(9), use_mtp=True)
    head = MtpHead.from_target(hybrid)
    with pytest.raises(ValueError, match="use_mtp"):
        answer(detached, tokens(9), use_mtp=True, assistant_model=head, policy="auto")


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (tokens(9), {}),
    "sampled": (tokens(9), SAMPLED),
    "batch": (padded(3), {"eos_token_id": [2]}),
    "batch in lockstep": (padded(3), {"lockstep": True}),
    "sampled batch": (padded(3), SAMPLED | {"eos_token_id": [2]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_text_of_plain_generate(name: str, target: PreTrainedModel, head: MtpHead) -> None:
    inputs, options = CALLS[name]
    check_counts(compare(target, head, inputs, **options), in_a_row=1)


@torch.no_grad()
def test_compiled_steps_serve_layers_that_are_fed_after_the_final_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by nothing, but with all that compiled steps do without: hooks above all."""
    target = attached("GLM-4.6", tmp_path)
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **options: function)
    head = MtpHead.from_target(target)
    plain = answer(target, tokens(9))
    found = answer(target, tokens(9), assistant_model=head, policy=FixedPolicy(TreeShape(8, 3, 2)), compile=True)
    assert found.sequences.tolist() == plain.sequences.tolist()
    engine = target.speculation_state.slot_engine
    assert engine.is_compiled and engine.obstacle is None
    before = MtpHead.from_target(target, fed="before")
    answer(target, tokens(9), assistant_model=before, policy=FixedPolicy(TreeShape(8, 3, 2)), compile=True)
    assert "before the final norm" in str(engine.obstacle) or "after the final norm" in str(engine.obstacle)
