"""The benchmark on a tiny model, with a clock that ticks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.bench.__main__ import judge, main, report
from transformers_resps.bench.profile import Stopwatch, profile
from transformers_resps.bench.protocol import Bench, Method, Prompt, methods


SHAPE = TreeShape(4, 2, 2)
PROMPTS = [Prompt("a/0", torch.tensor([1, 9, 8, 7])), Prompt("b/0", torch.tensor([1, 30, 31, 30, 31]))]


class Ticking:
    """One second passes at every reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 6, Ticking())


def test_methods_take_turns_and_each_begins_as_often(bench: Bench, tiny_head: DraftHead) -> None:
    chosen = methods(tiny_head, [SHAPE], prompt_lookup=True)
    runs = list(bench.run(PROMPTS, chosen, repeats=3))
    order = [run.measurement.method for run in runs]
    assert order[:6] == ["plain", "prompt lookup", "tree 4/2/2", "prompt lookup", "tree 4/2/2", "plain"]
    assert {m: order[::3].count(m) for m in order} == {"plain": 2, "prompt lookup": 2, "tree 4/2/2": 2}
    assert all(run.measurement.seconds == 1.0 for run in runs)


def test_every_method_is_counted_alike(bench: Bench, tiny_head: DraftHead) -> None:
    plain = bench.decode(PROMPTS[0], Method("plain"), 0)
    tree = bench.decode(PROMPTS[0], methods(tiny_head, [SHAPE])[1], 0)
    assert plain.token_ids.tolist() == tree.token_ids.tolist()
    assert plain.measurement.target_forwards == plain.measurement.tokens == tree.measurement.tokens
    assert tree.measurement.target_forwards <= plain.measurement.target_forwards


def test_every_kind_of_method_writes_the_plain_text(bench: Bench, tiny_head: DraftHead) -> None:
    chosen = methods(tiny_head, [SHAPE, TreeShape(4, 2, 2, lookup=3)], prompt_lookup=True, auto=True)
    names = [method.name for method in chosen]
    assert names == ["plain", "prompt lookup", "tree 4/2/2", "tree 4/2/2+3", "auto, no head", "auto"]
    same, unexplained = judge(bench, PROMPTS, list(bench.run(PROMPTS, chosen, repeats=1)))
    assert same == dict.fromkeys(names, 2) and not unexplained


def test_a_wrong_answer_is_reported(bench: Bench) -> None:
    plain = bench.decode(PROMPTS[0], Method("plain"), 0)
    wrong = bench.decode(PROMPTS[0], Method("tree", {"suppress_tokens": plain.token_ids[2:3].tolist()}), 0)
    same, unexplained = judge(bench, PROMPTS, [plain, wrong])
    assert same == {"plain": 1, "tree": 0}
    assert len(unexplained) == 1 and unexplained[0].startswith("tree, a/0, position")


def test_the_report_writes_every_measurement_and_its_circumstances(
    bench: Bench, tiny_head: DraftHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = methods(tiny_head, [SHAPE], prompt_lookup=False)
    runs = list(bench.run(PROMPTS, chosen, repeats=2))
    args = SimpleNamespace(dataset=[Path("a.jsonl"), Path("b.jsonl")], output=tmp_path, target="t", head="h")
    assert report(bench, chosen, PROMPTS, runs, args) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {
        "schema",
        "command",
        "commit",
        "device",
        "dtype",
        "threads",
        "versions",
        "target",
        "head",
    } <= results.keys()
    assert len(results["measurements"]) == 8 and list(results["summaries"]) == ["a", "b", "all"]
    assert results["same_text"] == {"plain": 2, "tree 4/2/2": 2}
    assert "| all | tree 4/2/2 | " in capsys.readouterr().out


def test_a_stopwatch_times_calls_and_leaves_no_trace(tiny_target: PreTrainedModel) -> None:
    watch = Stopwatch(Ticking())
    with watch.around(tiny_target, "forward", "target"):
        tiny_target(input_ids=torch.tensor([[1, 2]]))
    assert watch.seconds == {"target": [1.0]}
    assert "forward" not in vars(tiny_target)


def test_a_profile_accounts_for_all_the_time(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    bench = Bench(attach(tiny_target), 6)
    tree = Method("tree", {"assistant_model": tiny_head, "policy": FixedPolicy(SHAPE)})
    found = profile(bench, tiny_head, tree, PROMPTS)
    assert 0 < found.overhead_share < 1
    assert found.prefill_ratio > 0 and found.level_cost > 0
    assert found.peak_bytes_tree >= found.peak_bytes_plain > 0


def test_a_malformed_shape_ends_with_a_usage_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["target", "head", "--dataset", "x.jsonl", "--shapes", "8,4"])
    assert "--shapes" in capsys.readouterr().err
