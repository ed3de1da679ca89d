"""Planted costs are found, kept, and believed only where they were measured, on a machine called by its own name."""

import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.assistants.kinds import KINDS, add_mtp_layer, pair_of
from tests.conftest import FakeClock
from tests.recurrent_targets import NEEDS_STATES, recurrent
from tests.targets import ARCHITECTURES, Architecture
from transformers_resps import DraftHead, TreeShape
from transformers_resps.calibration import CONTEXTS, NODES, WIDTHS, calibrate, device_name, identity_of, processor_name
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.generation.request import Assistants
from transformers_resps.heads import BoundHead
from transformers_resps.policies.costs import CostTable, Range
from transformers_resps.tools.calibrate import what_must_be_accepted
from transformers_resps.tools.cli import main
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.hybrids import StateKinds, known_mixers
from transformers_resps.verifying.invariant.attention import INVARIANT
from transformers_resps.verifying.invariant.verifier import InvariantSteps


@pytest.fixture(scope="module")
def target() -> Any:
    return Architecture("llama", {"max_position_embeddings": 1024}).build("sdpa")


@pytest.fixture(scope="module")
def head(target: Any) -> DraftHead:
    return DraftHead.from_target(target)


def plant(target: Any, clock: FakeClock, seconds: Any) -> Any:
    """Every forward of the target takes `seconds(tokens)` on `clock`, and half a second more with stock attention."""

    def advance(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        stock = 0.5 if target.config._attn_implementation == "sdpa" else 0.0
        clock.advance(seconds(kwargs["input_ids"].shape[1]) + stock)

    return target.register_forward_hook(advance, with_kwargs=True)


def test_planted_costs_are_found(
    target: Any, head: DraftHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    hook = plant(target, clock, lambda tokens: 1.0 if tokens == 1 else 3.0 + tokens)
    draft, run = ModelDrafter.draft, BoundHead.run

    def slow_draft(self: Any, *arguments: Any) -> Any:
        clock.advance(0.1)
        return draft(self, *arguments)

    def slow_pass(self: Any, *arguments: Any) -> Any:
        clock.advance(0.25)  # over committed tokens, which gives the first level, or over a level
        return run(self, *arguments)

    monkeypatch.setattr(ModelDrafter, "draft", slow_draft)
    monkeypatch.setattr(BoundHead, "run", slow_pass)
    table = calibrate(target, head, folder=tmp_path, clock=clock)
    hook.remove()
    assert table.draft == pytest.approx(dict.fromkeys(WIDTHS, 0.25))
    assert table.draft_range == {width: pytest.approx((0.25, 0.25)) for width in WIDTHS}
    assert table.draft_start == pytest.approx(dict.fromkeys(WIDTHS, 0.1))
    assert set(table.verify) == set(CONTEXTS) and set(table.draft) == set(WIDTHS)
    for row in table.verify.values():
        assert row == {nodes: 1.0 if nodes == 1 else 3.0 + nodes for nodes in NODES}
    assert table.verify_seconds(5, 400) == pytest.approx(8.0)
    assert table.verify_seconds(40, 400) == pytest.approx(43.0)
    assert table.plain == dict.fromkeys(CONTEXTS, 1.5) and table.plain_seconds(400) == 1.5
    assert CostTable.load(next(tmp_path.iterdir())) == table
    assert CostTable(table.verify, {}, {}).plain_seconds(400) == 1.0
    assert table.identity["attention"] == "sdpa"
    assert 0 < table.overhead < 1
    costs = table.running(400)
    assert costs.step_seconds(TreeShape.plain(), 400) == pytest.approx(1.0 + table.overhead)
    assert costs.knows_plain and costs.verify_seconds(1) == 1.0 and costs.verify_seconds(8) == 11.0
    assert costs.draft_seconds(4, 5) == pytest.approx(0.1 + 5 * 0.25) and costs.level_seconds(4) == pytest.approx(0.25)


def test_steps_of_the_invariant_mode_have_a_table_of_their_own(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, leaves, verify = FakeClock(), dict[int, int](), InvariantSteps.verify

    def slow(self: InvariantSteps, tree: DraftTree) -> Any:
        nodes = tree.node_count
        found = nodes - len({0, *tree.parents[0, 1:].tolist()})
        leaves.setdefault(nodes, found)
        clock.advance(nodes + 2.0 * found)
        return verify(self, tree)

    monkeypatch.setattr(InvariantSteps, "verify", slow)
    hook = plant(target, clock, lambda tokens: 1.0)
    normal, table = (calibrate(target, invariant=mode, folder=tmp_path, clock=clock) for mode in (False, True))
    hook.remove()
    assert leaves[8] == 3 and leaves[16] == 6, "paths have a price there"
    assert normal.verify == dict.fromkeys(CONTEXTS, dict.fromkeys(NODES, 1.0)) and normal.plain
    assert table.verify == {
        context: {nodes: 1.0 + nodes + 2.0 * leaves[nodes] for nodes in NODES} for context in CONTEXTS
    }
    assert not table.plain and table.plain_seconds(400) == table.verify_seconds(1, 400)
    assert calibrate(target, folder=tmp_path) == normal
    assert calibrate(target, invariant=True, folder=tmp_path) == table
    for known, attention in ((normal, INVARIANT), (table, None)):
        with pytest.raises(ValueError, match="attention '.*resps_invariant'"):
            known.check_here(identity_of(target, None, attention))


def test_a_target_that_the_invariant_mode_refuses_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    (gemma,) = (one for one in ARCHITECTURES if str(one) == "gemma2")
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        calibrate(gemma.build("eager"), invariant=True, folder=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_of_every_kind_of_drafter_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, (target, head) = FakeClock(), pair_of(kind, tmp_path / "checkpoint")
    source = Assistants().source(target, head)
    assert source is not None
    steps = type(source.bind(target))
    run = steps.run

    def slow_pass(self: Any, *arguments: Any) -> Any:
        clock.advance(0.25)
        return run(self, *arguments)

    monkeypatch.setattr(steps, "run", slow_pass)
    plant(target, clock, lambda tokens: 1.0)
    table = calibrate(target, head, folder=tmp_path / "costs", clock=clock)
    assert table.draft == pytest.approx(dict.fromkeys(WIDTHS, 0.25))
    assert table.draft_start == pytest.approx(dict.fromkeys(WIDTHS, 0.0))
    assert table.identity["head"].startswith(f"{kind} of ") and 0 < table.overhead < 1
    assert calibrate(target, source, folder=tmp_path / "costs") == table


def test_levels_that_cost_nothing_are_measured_as_that(
    target: Any, head: DraftHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, draft = FakeClock(), ModelDrafter.draft
    hook = plant(target, clock, lambda tokens: 1.0)

    def slow(self: Any, *arguments: Any) -> Any:
        clock.advance(0.5)
        return draft(self, *arguments)

    monkeypatch.setattr(ModelDrafter, "draft", slow)
    table = calibrate(target, head, folder=tmp_path, clock=clock)
    hook.remove()
    assert table.draft == dict.fromkeys(WIDTHS, 0.0) and table.draft_start == dict.fromkeys(WIDTHS, 0.5)
    assert calibrate(target, head, folder=tmp_path) == table


def test_a_stored_table_of_an_older_release_is_measured_again(target: Any, tmp_path: Path) -> None:
    """It did not tell what a draft costs beside its levels."""
    identity = json.dumps(identity_of(target, None), sort_keys=True)
    older = tmp_path / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    CostTable({9: {1: 7.0}}, {}, identity_of(target, None)).save(older)
    assert calibrate(target, folder=tmp_path).verify != {9: {1: 7.0}}


def test_the_spread_of_the_repeats_is_kept(target: Any, tmp_path: Path) -> None:
    clock, calls = FakeClock(), itertools.count()
    hook = plant(target, clock, lambda tokens: 1.0 + 0.25 * (next(calls) % 3))
    table = calibrate(target, folder=tmp_path, clock=clock)
    hook.remove()
    for context, row in table.verify.items():
        assert table.verify_range[context].keys() == row.keys()
        assert set(row.values()) == {1.25} and set(table.verify_range[context].values()) == {(1.125, 1.375)}
        assert table.plain[context] == 1.75 and table.plain_range[context] == (1.625, 1.875)
    assert CostTable.load(next(tmp_path.iterdir())) == table


def spreading(plain: Range, two: Range) -> CostTable:
    """A forward over two nodes costs 1.2 plain ones, over more 1.4."""
    row = {1: 1.0, 2: 1.2, 4: 1.4, 8: 1.4}
    ranges = {nodes: (seconds, seconds) for nodes, seconds in row.items()} | {2: two}
    return CostTable({9: row}, {}, {}, 0.0, {9: 1.0}, {9: ranges}, {}, {9: plain})


def test_a_spread_above_the_differences_is_told_first() -> None:
    quiet = what_must_be_accepted(spreading((0.9, 1.1), (1.2, 1.3)))
    assert quiet.startswith("Cost of verifying, in plain forwards: 2 nodes 1.2,") and "can pay" in quiet
    for noisy in (spreading((0.9, 1.4), (1.2, 1.2)), spreading((1.0, 1.0), (1.0, 1.5))):
        told = what_must_be_accepted(noisy)
        assert told.startswith(
            "TOO NOISY TO TELL: repeats of one forward differ by 0.5 plain forwards, the costs by 0.4"
        )
        assert "can pay" not in told and "4 nodes 1.4" in told
    even = {nodes: 1.0 for nodes in (1, 2, 4, 8)}
    free = CostTable({9: even}, {}, {}, 0.0, {}, {9: dict.fromkeys(even, (0.97, 1.04))})
    assert "can pay" in what_must_be_accepted(free), "costs may be equal, and a small spread changes nothing"


@pytest.mark.parametrize(("comes", "leaves"), [(3, None), (0, 14), (4, 8), (10, 22), (21, None)])
def test_a_neighbour_that_comes_or_goes_while_costs_are_measured_is_no_verdict(
    comes: int, leaves: int | None, target: Any, tmp_path: Path
) -> None:
    """It slows every repeat of some sizes tenfold, so that no spread shows it."""
    clock, forwards = FakeClock(), itertools.count()

    def planted(tokens: int) -> float:
        size = next(forwards) // 4  # a warm-up and three repeats of each
        return 10.0 if comes <= size and (leaves is None or size < leaves) else 1.0 + 0.02 * tokens

    hook = plant(target, clock, planted)
    told = what_must_be_accepted(calibrate(target, folder=tmp_path, clock=clock))
    hook.remove()
    assert told.startswith("TOO NOISY TO TELL: one forward took ") and "can pay" not in told


def test_the_measurement_shows_how_far_it_is(target: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(target, folder=tmp_path)
    shown = capsys.readouterr().err
    assert "Measuring what steps cost:   0%" in shown and "23/23" in shown


def test_the_command_prints_the_table_and_what_it_means(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target.save_pretrained(tmp_path / "target")
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path))
    assert main(["calibrate", str(tmp_path / "target")]) == 0
    printed = capsys.readouterr().out
    assert "  nodes" in printed and "outside its forwards" in printed and "Cost of verifying, in plain" in printed
    assert "\n  plain  " in printed and " to " in printed
    assert "packed        False" in printed
    assert main(["calibrate", str(tmp_path / "target"), "--pack"]) == 0
    assert "packed        True" in capsys.readouterr().out
    assert main(["calibrate", str(tmp_path / "target"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["identity"]["packed"] is False and told["verdict"] in printed and len(told["verify"]) > 1
    assert main(["calibrate", str(tmp_path / "target"), "--invariant"]) == 0
    printed = capsys.readouterr().out
    assert "attention     resps_invariant" in printed and "One node is plain decoding." in printed
    add_mtp_layer(tmp_path / "target")
    assert main(["calibrate", str(tmp_path / "target"), "mtp"]) == 0
    printed = capsys.readouterr().out
    assert "head          MtpHead of" in printed and "Milliseconds of a draft: per level of the head" in printed


def test_a_table_is_measured_once_and_kept(target: Any, head: DraftHead, tmp_path: Path) -> None:
    first = calibrate(target, head, folder=tmp_path)
    assert all(first.draft_range[width][0] <= first.draft[width] <= first.draft_range[width][1] for width in WIDTHS)
    assert calibrate(target, head, folder=tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1
    assert calibrate(target, None, folder=tmp_path).draft == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_table_from_elsewhere_is_refused(target: Any, head: DraftHead, tmp_path: Path) -> None:
    table = calibrate(target, head, folder=tmp_path)
    elsewhere = CostTable(table.verify, table.draft, table.identity | {"threads": 99, "dtype": "torch.int8"})
    with pytest.raises(ValueError, match=r"dtype 'torch.int8' \(here: 'torch.float64'\), threads 99"):
        elsewhere.check_here(identity_of(target, head))


@pytest.mark.parametrize("clock", [lambda: 7.0, lambda: -time.perf_counter()], ids=["still", "back"])
def test_a_clock_that_does_not_go_forward_is_refused(target: Any, tmp_path: Path, clock: Any) -> None:
    with pytest.raises(ValueError, match="`clock` measured .*must advance.*`time.perf_counter`"):
        calibrate(target, folder=tmp_path, clock=clock)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("positions", [4, 20, 33, 34, 48])
def test_a_target_of_few_positions_is_measured_where_it_has_some(positions: int, tmp_path: Path) -> None:
    short = Architecture("gpt2", {"n_positions": positions, "max_position_embeddings": positions}).build("sdpa")
    table = calibrate(short, folder=tmp_path)
    (context,) = table.verify
    assert context >= 1 and context + max(table.verify[context]) <= positions


def test_a_folder_or_file_may_be_a_string(target: Any, tmp_path: Path) -> None:
    kept = calibrate(target, folder=str(tmp_path))
    kept.save(str(tmp_path / "new" / "table.json"))
    assert CostTable.load(str(tmp_path / "new" / "table.json")) == kept == calibrate(target, folder=tmp_path)


def test_targets_that_hold_no_tree_are_refused_before_they_are_measured(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=4))
    for model, message in ((t5, "encoder-decoder.*policy=.auto"), (mamba, "cannot verify sibling nodes")):
        with pytest.raises(ValueError, match=message):
            calibrate(model, folder=tmp_path)
    for pair in ((None,), ("gpt2",), (torch.nn.Linear(2, 2),), (type(t5),)):
        with pytest.raises(ValueError, match="needs a loaded causal LM, got .*Load it"):
            calibrate(*pair, folder=tmp_path)  # type: ignore[arg-type]


CPUINFO = (
    "processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 99\n"
)


def test_two_generations_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for model in (1, 17):
        (tmp_path / "cpuinfo").write_text(CPUINFO.format(model=model))
        names.append(processor_name(tmp_path / "cpuinfo"))
    assert names == ["AMD EPYC (family 25, model 1)", "AMD EPYC (family 25, model 17)"]


def test_a_system_that_tells_less_still_has_a_name(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "missing")
    (tmp_path / "cpuinfo").write_text("model name: Ash Tray 9\n")
    assert processor_name(tmp_path / "cpuinfo") == "Ash Tray 9"


def test_a_device_has_the_name_of_its_maker_or_else_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert device_name(torch.device("cuda", 1)) == "Card 1"
    assert device_name(torch.device("mps")) == "mps"
    assert torch.backends.cpu.get_cpu_capability() in device_name(torch.device("cpu"))


@NEEDS_STATES
def test_advancing_the_states_along_the_accepted_tokens_is_in_the_price_of_a_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_clock: FakeClock
) -> None:
    target = recurrent("qwen3_next")[0].build()
    mixers, stock_advance = known_mixers(target), StateKinds.advance
    kind = type(next(iter(mixers.values())))
    forward = kind.forward

    def read(self: Any, *arguments: Any, **keywords: Any) -> Any:
        fake_clock.advance(1.0)
        return forward(self, *arguments, **keywords)

    def advance(*arguments: Any) -> None:
        fake_clock.advance(100.0)
        stock_advance(*arguments)

    monkeypatch.setattr(kind, "forward", read)
    monkeypatch.setattr(StateKinds, "advance", advance)
    verify = calibrate(target, folder=tmp_path, clock=fake_clock).verify
    for seconds in verify.values():
        assert seconds[1] == len(mixers)
        assert {seconds[nodes] for nodes in seconds if nodes > 2} == {len(mixers) + 100.0}
