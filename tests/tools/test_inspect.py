"""`resps inspect` as a user types it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.assistants.kinds import add_mtp_layer
from tests.targets import ARCHITECTURES
from tests.tokenizers import letter_tokenizer
from tests.tools.examples import examination
from tests.tools.test_inspect_page import parsed
from transformers_resps import BaselineGuard, DraftHead, FixedPolicy, Policy, ThroughputPolicy, TreeShape, attach
from transformers_resps.tools.cli import main
from transformers_resps.tools.inspect import Examination, RecordedStep, StepRecorder, examine, is_explained
from transformers_resps.tools.session import Dialogue
from transformers_resps.verifying.growing import TreeVerifier
from transformers_resps.verifying.slots.verifier import SlotVerifier

from .examples import merged_step


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A target that speaks letters, and a head of it."""
    target: PreTrainedModel = ARCHITECTURES[0].build("sdpa").float()
    folder = tmp_path_factory.mktemp("models")
    target.save_pretrained(folder / "letters")
    add_mtp_layer(folder / "letters")
    letter_tokenizer().save_pretrained(folder / "letters")
    ARCHITECTURES[0].build("sdpa", seed=1).save_pretrained(folder / "small")
    torch.manual_seed(1)
    DraftHead.from_target(target).save_pretrained(folder / "letters-head")
    return str(folder / "letters"), str(folder / "letters-head")


def inspected(output: Path, *arguments: str) -> dict[str, object]:
    """The data of the page that the command writes."""
    assert main(["inspect", *arguments, "--output", str(output), "--max-new-tokens", "24"]) == 0
    found: dict[str, object] = json.loads(parsed(output.read_text(encoding="utf-8")).content["script#page-data"])
    return found


def test_it_writes_the_page_and_says_how_it_went(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "page.html"
    data = inspected(output, *folders, "--prompt", "dedede")
    assert data["prompt"] == "dedede" and data["sameText"] == {"same": True}
    facts = data["facts"]
    assert isinstance(facts, dict)
    assert (facts["target"], facts["head"], facts["decoding"]) == ("letters", "letters-head (DraftHead)", "greedy")
    assert str(tmp_path.parent) not in output.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "24 tokens in" in printed and "Same text as plain decoding: yes." in printed
    assert f"The page: {output}" in printed


@pytest.mark.parametrize(("name", "shown"), [("mtp", "letters (MtpHead)"), ("small", "small (CausalDrafter)")])
def test_any_drafter_is_shown(folders: tuple[str, str], tmp_path: Path, name: str, shown: str) -> None:
    given = name if name == "mtp" else str(Path(folders[0]).parent / name)
    data = inspected(tmp_path / "page.html", folders[0], given, "--prompt", "dedede")
    assert data["facts"]["head"] == shown and data["sameText"] == {"same": True}  # type: ignore[index]
    assert any(step.get("headNodes") for step in data["steps"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ("6,3,2,4", "FixedPolicy(6/3/2+4)"),
        ("auto", "BaselineGuard(ThroughputPolicy(depth=8, top_k=10))"),
        ("policy", "FixedPolicy(5/2/2)"),
    ],
)
def test_a_policy_is_named_by_its_numbers_as_auto_or_by_its_folder(
    folders: tuple[str, str], tmp_path: Path, given: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FixedPolicy(TreeShape(5, 2, 2)).save_pretrained("policy")
    data = inspected(tmp_path / "page.html", *folders, "--prompt", "dedede", "--policy", given)
    assert data["facts"]["policy"] == policy  # type: ignore[index]


def test_the_target_reads_the_prompt_that_the_benchmark_gives_it(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(*given: Any, **settings: Any) -> Examination:
        seen.append(given[3].tolist())
        return examine(*given, **settings)

    monkeypatch.setattr("transformers_resps.tools.inspect.examine", spy)
    inspected(tmp_path / "page.html", *folders, "--prompt", "dedede")
    asked = Dialogue.of("d/0", [{"role": "user", "content": "dedede"}]).prompt(letter_tokenizer())
    assert seen == [asked.input_ids.tolist()] * 2  # to warm up, and to be timed


def test_without_a_head_it_shows_lookup_drafts(folders: tuple[str, str], tmp_path: Path) -> None:
    data = inspected(tmp_path / "page.html", folders[0], "--prompt", "dedede")
    assert "head" not in data["facts"]  # type: ignore[operator]


def test_sampled_answers_are_compared_with_the_same_seed(folders: tuple[str, str], tmp_path: Path) -> None:
    sampled = ("--prompt", "dedede", "--temperature", "0.8", "--seed", "5")
    data = inspected(tmp_path / "page.html", *folders, *sampled)
    assert data["sameText"] == {"same": True}
    assert data["facts"]["decoding"] == "temperature 0.8, seed 5"  # type: ignore[index]


@pytest.mark.parametrize(("temperature", "decoding"), [("0", "greedy"), ("0.8", "temperature 0.8, seed 0")])
def test_both_answers_of_the_invariant_mode_are_written_in_it(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: str, decoding: str
) -> None:
    read = Counter[type]()
    for kind in (SlotVerifier, TreeVerifier):

        def prefill(self: Any, *given: Any, known: Any = kind.prefill, **options: Any) -> Any:
            read[type(self)] += 1
            return known(self, *given, **options)

        monkeypatch.setattr(kind, "prefill", prefill)
    asked = ("--prompt", "dedede", "--dtype", "bfloat16", "--temperature", temperature, "--invariant")
    data = inspected(tmp_path / "page.html", *folders, *asked)
    assert data["sameText"] == {"same": True}
    assert data["facts"]["decoding"] == f"{decoding}, invariant"  # type: ignore[index]
    assert read == {SlotVerifier: 4}  # two answers, and two that warm up


def test_no_difference_is_explained_in_the_invariant_mode() -> None:
    for is_invariant in (False, True):
        found = replace(examination("helqz"), is_invariant=is_invariant)  # as if sampled
        assert is_explained(found, torch.bfloat16) is not is_invariant
    assert is_explained(replace(examination(), is_invariant=True), torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "  "], "`--prompt` is empty"),
        (["--prompt", "de", "--policy", "8,x"], "'8,x' is no shape"),
        (["--prompt", "de", "--policy", "no/where/at/all"], "no/where/at/all"),
    ],
)
def test_what_cannot_be_inspected_is_refused_by_name(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", *folders, *arguments, "--output", str(tmp_path / "page.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_bar_moves_by_the_steps_of_both_answers(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            assert options["total"] == 48

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exception: object) -> None:
            assert sum(moved) == 48 and max(moved[:24]) == 1

        def update(self, n: int) -> None:
            moved.append(n)

    monkeypatch.setattr("transformers_resps.tools.inspect.tqdm", Bar)
    inspected(tmp_path / "page.html", *folders, "--prompt", "dedede")
    assert moved


# What a recorder keeps, on real steps of tiny models.
SHAPE = TreeShape(6, 3, 2, 4)


def found_at(step: RecordedStep, source: str) -> list[int]:
    """The nodes that a source proposed."""
    return [node for node, own in enumerate(step.sources) if own == source]


def examined(target: PreTrainedModel, head: DraftHead | None, policy: Policy, prompt: dict[str, Any]) -> Examination:
    return examine(attach(target), head, policy, prompt["input_ids"][0], settings={"max_new_tokens": 40})


@pytest.fixture
def found(tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]) -> Examination:
    return examined(tiny_target, tiny_head, FixedPolicy(SHAPE), prompt)


def test_every_step_but_the_prefill_is_kept(found: Examination) -> None:
    assert [step.record for step in found.steps] == found.report.steps[1:]
    assert [step.step for step in found.steps] == list(range(len(found.steps)))
    assert found.parts_at is None


def test_the_accepted_path_of_every_tree_is_the_text(found: Examination) -> None:
    answer = found.report.answers[0]
    start = 1
    for step in found.steps:
        tokens = step.tree.tokens[0].tolist()
        assert tokens[0] == answer[start - 1]
        assert [tokens[node] for node in step.path[1:]] == answer[start : start + step.record.emitted[0] - 1]
        assert step.context_length == len(found.prompt_ids) + start
        start += step.record.emitted[0]


def test_nodes_of_the_head_have_its_scores_and_the_looked_up_ones_come_last(found: Examination) -> None:
    for step in found.steps:
        last = step.tree.node_count - len(found_at(step, "lookup"))
        assert found_at(step, "lookup") == list(range(last, step.tree.node_count))
        assert bool((step.tree.scores[0, 1:] < 0).all())
        assert last == 6 or step.record.shape.depth < 3
        proposed = step.record.proposed
        assert proposed.lookup == len(set(step.path) & set(found_at(step, "lookup")))
        assert proposed.both == len(set(step.path) & set(found_at(step, "both")))
        assert sum(proposed) == int(step.record.accepted)
    assert any(found_at(step, "lookup") for step in found.steps)


def test_levels_are_those_that_were_drafted(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class TwoLevels(FixedPolicy):
        grows = True

        def grow(self, level: Any) -> bool:
            return bool(level.depth < 2)

    found = examined(tiny_target, tiny_head, TwoLevels(SHAPE), prompt)
    whole = [step for step in found.steps if step.record.shape == SHAPE]
    assert whole and all(step.levels == 2 for step in whole)
    for step in whole:
        by_the_head = step.tree.node_count - len(found_at(step, "lookup"))
        assert int(step.tree.depths[0, :by_the_head].max()) <= 2


def test_a_chain_through_nodes_of_the_head_is_both_sources() -> None:
    step = merged_step()
    assert found_at(step, "lookup") == [4]
    assert found_at(step, "both") == [1, 3]


def test_the_policy_decides_as_if_nobody_looked(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class Told(FixedPolicy):
        def __init__(self) -> None:
            super().__init__(SHAPE)
            self.records: list[Any] = []

        def observe(self, record: Any) -> None:
            self.records.append(record)

    policy = Told()
    found = examined(tiny_target, tiny_head, policy, prompt)
    assert policy.records == [step.record for step in found.steps]
    assert all(step.chosen == SHAPE for step in found.steps)
    assert repr(StepRecorder(policy)) == repr(policy)


def test_a_policy_of_another_head_is_refused_as_if_nobody_looked(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    class Foreign(FixedPolicy):
        head_identity = {"vocab_size": 7}

        def check_identity(self, **given: Any) -> None:
            raise ValueError(f"made for another {' and '.join(given)}")

    with pytest.raises(ValueError, match="made for another target and head"):
        examined(tiny_target, tiny_head, Foreign(SHAPE), prompt)


def test_lookup_alone_needs_no_head(tiny_target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    policy = BaselineGuard(ThroughputPolicy())
    assert not StepRecorder(policy).needs_head
    assert StepRecorder(FixedPolicy(SHAPE)).needs_head
    found = examined(tiny_target, None, policy, prompt)
    assert found.parts_at is None
    assert all(len(found_at(step, "lookup")) == step.tree.node_count - 1 and step.levels == 0 for step in found.steps)


def test_a_sampled_examination_equals_plain_sampling_and_leaves_the_generator_alone(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    state = torch.random.get_rng_state()
    settings = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.7}
    policy = FixedPolicy(SHAPE)
    found = examine(attach(tiny_target), tiny_head, policy, prompt["input_ids"][0], settings=settings, seed=3)
    other = examine(attach(tiny_target), tiny_head, policy, prompt["input_ids"][0], settings=settings, seed=4)
    assert found.parts_at is None and found.divergence is None
    assert found.report.answers != other.report.answers
    assert torch.equal(state, torch.random.get_rng_state())
