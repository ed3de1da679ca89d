"""Other libraries beside ours: counted alike, refused where they are missing, and the real ones where they are not."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.bench.conversations import Ticking
from transformers_resps import attach
from transformers_resps.bench import __main__ as command
from transformers_resps.bench.judging import Judge
from transformers_resps.bench.methods import Method, peers, plain
from transformers_resps.bench.peers import PEERS, load_peers, peer_versions
from transformers_resps.bench.prompts import Prompt
from transformers_resps.bench.runs import Bench


PROMPT = Prompt("a/0", torch.tensor([1, 30, 31, 30, 31, 30]))


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 12, Ticking())


def test_an_answer_of_another_library_is_counted_like_all_others(bench: Bench) -> None:
    """It may run the target's layers without the target, as economize does, and write on after the end."""
    asked: list[Any] = []

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, end_ids: Sequence[int]) -> Tensor:
        asked.append((input_ids.tolist(), max_new_tokens, temperature, list(end_ids)))
        bench.model.model(input_ids)
        bench.model.model(input_ids)
        return torch.tensor([7, end_ids[0], 9, 9])

    (method,) = peers({"other": answer})
    bench.model.generation_config.eos_token_id = [2]
    run = Bench(bench.model, 12, Ticking()).decode(PROMPT, method, temperature=0.5)
    assert asked == [([PROMPT.input_ids.tolist()], 12, 0.5, [2])]
    assert run.token_ids.tolist() == [7, 2] and run.timing.tokens == 2 and not run.steps
    assert run.timing.target_forwards == 2 and run.timing.prefill_seconds == 2.0


def test_a_wrong_answer_of_another_library_is_reported(bench: Bench) -> None:
    one = bench.decode(PROMPT, plain())
    other = Method("other", seed_exact=False, answer=lambda *_: (one.token_ids + 1) % 64)
    judge = Judge(bench.model, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other)])
    assert judge.same_text["other"] == 0 and len(judge.unexplained) == 1


@pytest.mark.parametrize("name", PEERS)
def test_a_library_that_is_not_there_is_named_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert command.main(["nowhere", "nothing", "--dataset", "x.jsonl", "--peers", name]) == 2
    error = capsys.readouterr().err
    assert f"--peers needs {name}" in error and "pip install 'transformers-resps[peers]'" in error


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("with_model", [False, True], ids=["lookup", "draft-model"])
@pytest.mark.parametrize("name", PEERS)
def test_the_real_library_writes_the_plain_text_in_fewer_forwards(
    name: str, with_model: bool, tiny_target: PreTrainedModel, tmp_path: Path
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'transformers-resps[peers]'")
    tiny_target.save_pretrained(tmp_path)  # drafts for itself: every draft is accepted
    draft_model = AutoModelForCausalLM.from_pretrained(tmp_path) if with_model else None
    bench = Bench(attach(tiny_target), 12, Ticking())
    chosen = [plain(), *peers(load_peers([name], bench.model, draft_model))]
    judge = Judge(bench.model, chosen)
    runs = [bench.decode(PROMPT, method) for method in chosen]
    judge.add(PROMPT, runs)
    assert judge.same_text == {method.name: 1 for method in chosen} and not judge.unexplained
    forwards = [run.timing.target_forwards for run in runs]
    assert forwards[0] == 12 and (forwards[1] <= 6 if with_model else 1 < forwards[1] <= 12)
    sampled = [bench.decode(PROMPT, chosen[1], seed, 1.0).token_ids.tolist() for seed in (0, 1, 0)]
    assert len(sampled[0]) == 12 and sampled[0] == sampled[2] != sampled[1]
    assert bench.decode(PROMPT, plain()).token_ids.tolist() == runs[0].token_ids.tolist()  # it left the target alone
    assert set(peer_versions([name])) == {name}
