"""Each kind of experiment from its models to its results file, on a tiny target."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tools.conversations import save_models, save_rows
from training.benchmarking import peers
from training.evidence import arms, measuring, quiet, replaying
from training.evidence import experiments as named
from training.evidence.__main__ import parser
from training.evidence.experiments import Experiment
from training.evidence.page import noise_of
from training.evidence.prompts import EAGLE_SETS
from training.evidence.sealed import Measured
from transformers_resps import DraftHead, TreeShape
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.tools.methods import Answer

from .files import CODE


Run = Callable[[Experiment], Measured]


@pytest.fixture
def options(tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead) -> Namespace:
    target, _ = save_models(tmp_path, tiny_target, tiny_head)
    tiny_head.save_pretrained(tmp_path / "smollm2-135m-instruct-head")
    prompts = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"], ["klkl"], ["mnop"], ["qrst"]])
    given = ["--target", target, "--prompts", prompts, "--work", str(tmp_path / "work"), "--accept-noise"]
    return parser().parse_args([*given, "--each", "4"])


@pytest.fixture
def run(tmp_path: Path, options: Namespace, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Measures an experiment in this process. What is compiled runs as it is: compilation takes half a minute."""
    monkeypatch.setattr(compiled_function.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(arms, "CARDS", tmp_path)
    monkeypatch.setattr(arms, "REPAIRED", tmp_path)
    monkeypatch.setattr(arms, "load_target", lambda name, *_, **options: load(name, **options))
    monkeypatch.setattr(arms, "CANDIDATES", (TreeShape(3, 2, 1), TreeShape(4, 2, 2)))
    monkeypatch.setattr(measuring, "DEMO_PROMPTS", save_rows(tmp_path / "other.jsonl", [["uvwx"]]))
    monkeypatch.setattr(measuring, "SAMPLED", 4)
    monkeypatch.setattr(measuring, "code", lambda: {"code_sha256": CODE, "commit": None, "dirty": False})
    monkeypatch.setattr(quiet, "probe", lambda: [1.0] * 9)
    monkeypatch.setattr(quiet, "other_load", lambda: 0.0)

    def load(name: str, **options: Any) -> Any:
        from transformers_resps.tools.loading import load_target

        return load_target(name, "float32", "cpu", **options)

    def measure(experiment: Experiment) -> Measured:
        measuring.run(experiment, 0, options, tmp_path / "out" / f"{experiment.name}-0.json")
        return Measured.read(tmp_path / "out" / f"{experiment.name}-0.json")

    return measure


def small(name: str, **changes: Any) -> Experiment:
    one = next(one for one in named.EXPERIMENTS if one.name == name)
    return replace(one, tokens=6, **changes)


def test_every_arm_answers_every_turn_and_one_that_is_missing_says_why(run: Run) -> None:
    found = run(small("policy-smollm2-t0"))
    found.check_arms(named.POLICIES)
    answered = [(row["prompt"], row["turn"], row["arm"]) for row in found.data["rows"]]
    assert len(answered) == len(set(answered)) == 5 * 3
    assert found.data["left_out"] == dict.fromkeys(
        (named.FITTED, named.PUBLISHED, named.REPAIRED), "no such policy was trained for this target"
    )
    assert all(row["same"] for row in found.data["rows"])  # in float32
    drafted = [row for row in found.data["rows"] if row["arm"] == named.FIXED]
    assert all(sum(row["steps"].values()) == row["forwards"] - 1 for row in drafted)
    assert found.data["settings"]["best"] in ("3/2/1", "4/2/2")


def test_beside_a_memory_only_what_looks_up_is_measured(
    run: Run, tiny_head: DraftHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "CANDIDATES", (TreeShape(3, 2, 1), TreeShape(3, 2, 1, 2)))
    never = ReSpSPolicy(ReSpSConfig(tiny_head.config.features_width, ActionGrid((TreeShape(4, 2, 2),))))
    never.save_pretrained(tmp_path / "smollm2-135m-instruct-policy-paper")
    found = run(small("policy-smollm2-memory"))
    assert found.data["settings"]["best"] == "3/2/1+2"
    assert found.data["left_out"][named.PUBLISHED] == "it never looks anything up"
    assert named.AUTO in {row["arm"] for row in found.data["rows"]}


def test_a_target_in_few_bits_answers_with_its_own_text_however_it_is_drafted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "_GROUP", 16)
    found = run(small("quantized-smollm2"))
    others = [name for bits in (8, 4) for name in (*peers.OPENVINO_WAYS[bits], *peers.LLAMA_CPP_WAYS[bits])]
    others += (named.SELF, named.SELF_LOOKUP)  # in float32
    assert set(found.data["left_out"]) == set(others)
    [journal] = (tmp_path / "work").glob("quantized-smollm2-0-*/journal.jsonl")
    texts: dict[str, list[list[int]]] = {}
    for line in map(json.loads, journal.read_text().splitlines()[1:]):
        texts.setdefault(line["method"], []).append(line["token_ids"])
    plain, auto, int8, int8_auto, int4, int4_auto = (texts[name] for name in named.QUANTIZED if name not in others)
    assert plain == auto and int8 == int8_auto and int4 == int4_auto and int4 not in (plain, int8)


def test_an_engine_that_does_not_start_takes_no_other_with_it(
    run: Run, options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started:
        version = "0.0"

        def __init__(self, python: Path, told: dict[str, Any], threads: int) -> None:
            if told["speculative_config"] and told["speculative_config"]["method"] == "eagle3":
                raise OSError("vLLM ended before it had answered.")

        def __enter__(self) -> "Started":
            return self

        def __exit__(self, *_: object) -> None: ...

        def answer(self, input_ids: Any, most: int, *_: Any) -> Answer:
            return Answer([3] * most, target_forwards=most)

    monkeypatch.setattr(peers, "Vllm", Started)
    options.vllm = "python"
    found = run(small("engines-smollm2", arms=(named.PLAIN, *named.VLLM)))
    assert found.data["left_out"] == {"vLLM (head)": "vLLM ended before it had answered."}
    assert {row["arm"] for row in found.data["rows"]} == {named.PLAIN, *named.VLLM[:2]}


def test_texts_go_on_where_a_process_was_stopped_and_what_is_timed_begins_anew(
    run: Run, options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = measuring.JournaledBench.decode, []

    def stopped(self: Any, prompt: Any, method: Any, *args: Any, **options: Any) -> Any:
        if not options:  # no warm-up
            calls.append(method.name)
            if len(calls) == 5:
                raise KeyboardInterrupt
        return decode(self, prompt, method, *args, **options)

    monkeypatch.setattr(measuring.JournaledBench, "decode", stopped)
    monkeypatch.setattr(measuring, "FOREIGN_PROMPTS", str(tmp_path / "mine.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        run(small("normal-smollm2"))
    [journal] = (tmp_path / "work").glob("normal-smollm2-0-*/journal.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 4
    texts = run(small("normal-smollm2"))
    assert len(texts.data["rows"]) == 5 * 3 and all(row["same"] for row in texts.data["rows"])
    timed = small("other-domain")
    first, again = run(timed).data["rows"], run(timed).data["rows"]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in again]
    assert [row["seconds"] for row in first] != [row["seconds"] for row in again]


def test_texts_of_the_exact_mode_are_compared_with_its_plain_ones(run: Run) -> None:
    found = run(small("exact-smollm2", batch=2))
    assert found.data["left_out"] == {named.EXACT_BLOCK: "no block head was given (`--block-head`)"}
    assert {row["arm"] for row in found.data["rows"]} == {named.EXACT_PLAIN, named.EXACT, named.EXACT_MEMORY}
    assert all(row["same"] for row in found.data["rows"]) and not noise_of(small("exact-smollm2", batch=2), [found])


def test_a_question_that_two_files_hold_is_asked_once(options: Namespace, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    options.sets, options.gsm8k, options.each = str(sets), save_rows(tmp_path / "gsm8k.jsonl", [["a"], ["b"]]), 20
    for name in EAGLE_SETS:
        save_rows(sets / f"{name}.jsonl", [["a"]])
    asked = measuring.prompts_of(small("exact-smollm2"), options, set())
    names = [one.name for one in asked]
    assert len(names) == len(set(names)) and names[-1] == "gsm8k/1"


def test_samples_of_each_arm_have_seeds_of_their_own(run: Run, options: Namespace) -> None:
    options.each = 1
    rows = run(small("samples-smollm2")).data["rows"]
    assert len(rows) == 3 * 4 and all(len(row["ids"]) == 6 for row in rows)
    assert len({tuple(row["ids"]) for row in rows}) > 4


def test_answers_of_a_batch_are_judged_one_by_one(run: Run, options: Namespace, tmp_path: Path) -> None:
    rows = [{"turns": ["kl"], "reference": ["no number"]}, {"turns": ["mn"], "reference": ["#### 5"]}]
    questions = tmp_path / "gsm8k.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    options.gsm8k = str(questions)
    found = run(small("gsm8k-qwen", target="smollm2", batch=2)).data["rows"]
    assert len(found) == 2 * 3 and all(row["same"] for row in found)
    assert {(row["prompt"], row["right"]) for row in found} == {("gsm8k/0", True), ("gsm8k/1", False)}


def test_a_batch_is_one_request(run: Run) -> None:
    rows = run(small("policy-smollm2-batch4", arms=(named.PLAIN, named.AUTO))).data["rows"]
    assert [row["prompt"] for row in rows] == ["mine/0 and 3 more"] * 2
    assert all(row["tokens"] > 6 for row in rows)


def test_the_fixed_tree_of_a_batch_is_searched_for_in_such_batches(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], TreeShape | None]] = []

    def together(bench: Any, group: Any, method: Any, *more: Any) -> Any:
        policy = method.keywords.get("policy")
        asked.append(([prompt.name for prompt in group], getattr(policy, "shape", None)))
        row, texts = answer(bench, group, method, *more)
        return row | {"seconds": 1.0 if asked[-1][1] == TreeShape(4, 2, 2) else 2.0}, texts

    answer = measuring.together
    monkeypatch.setattr(measuring, "together", together)
    monkeypatch.setattr(measuring, "DEMO_PROMPTS", save_rows(tmp_path / "other.jsonl", [["uv"], ["wx"], ["yz"]]))
    found = run(small("policy-smollm2-batch4", arms=(named.PLAIN, named.FIXED), batch=2)).data
    assert found["settings"]["best"] == str(TreeShape(4, 2, 2))
    searched = [(names, shape) for names, shape in asked if names[0].startswith("other")]
    assert searched == [
        (names, shape)
        for shape in (TreeShape(3, 2, 1), TreeShape(4, 2, 2))
        for names in (["other/0", "other/1"], ["other/2"])
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_a_process_says_the_most_memory_that_it_held(
    options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "OURS", tmp_path / "mine.jsonl")
    given = small("memory-smollm2", each=1), options.target, str(tmp_path / "head"), torch.get_num_threads()
    assert 100 < measuring.decoding_mib(named.STOCK, *given) < 10_000  # PyTorch alone takes more than the least


def test_policies_decide_again_under_planted_costs_and_none_beats_the_oracle(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replaying._WIDE[0] + 1  # than "auto" asks for, as Re-SpS may
    monkeypatch.setattr(replaying, "grid_of", lambda name: ActionGrid.from_bins((2, 8, 12), (2, deep), (2, 4)))
    rows = run(small("planted-smollm2-h100")).data["rows"]
    seconds = {arm: sum(row["seconds"] for row in rows if row["arm"] == arm) for arm in (named.FIXED, named.ORACLE)}
    assert seconds[named.ORACLE] <= seconds[named.FIXED]


def test_the_answer_of_a_question_is_its_last_number_or_what_follows_the_mark(tmp_path: Path) -> None:
    assert measuring.last_number("so 3 + 4 = 7 apples.") == 7.0
    assert measuring.last_number("1,200 it is\n#### 1,250") == 1250.0
    assert measuring.last_number("none") is None
    file = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "a", "answer": "x\u2028 #### 5"}, {"turns": ["b"], "reference": ["y\n#### 6"]}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert measuring.right_answers(str(file)) == {"gsm8k/0": 5.0, "gsm8k/1": 6.0}
