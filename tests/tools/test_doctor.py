"""Faults planted in a good head are found, named and mended; a good head is left alone."""

import json
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from tests.conftest import build_target
from tests.tokenizers import letter_tokenizer
from tests.tools.diagnoses import Pair, diagnose, fit
from transformers_resps.drafting import DraftCache
from transformers_resps.heads import BoundHead, DraftHead
from transformers_resps.heads.unrolled import unroll
from transformers_resps.tools.cli import main
from transformers_resps.tools.doctor import DEPTHS, LabelledText, refined, write_answers
from transformers_resps.verifying.forward import FeatureTap
from transformers_resps.verifying.prepacking import PackedWeight


V, PERIOD, LENGTH = 24, 7, 28
LAYERS, BASE = [1, 2, 3], 1e4


def periodic_texts(count: int, generator: torch.Generator) -> Tensor:
    """Seven random tokens over and over: what comes next lies a fixed distance back, so that RoPE matters."""
    block = torch.randint(3, V, (count, PERIOD), generator=generator)
    return block.repeat(1, LENGTH // PERIOD)


def train_target(generator: torch.Generator, last_norm: Tensor | None = None) -> PreTrainedModel:
    target: Any = build_target(num_hidden_layers=5, vocab_size=V, initializer_range=0.1).train()
    if last_norm is not None:
        target.model.norm.weight.data.copy_(last_norm)

    def loss() -> Tensor:
        texts = periodic_texts(16, generator)
        return target(texts, labels=texts).loss  # type: ignore[no-any-return]

    fit(target, loss)
    return target.eval()  # type: ignore[no-any-return]


def train(generator: torch.Generator) -> tuple[PreTrainedModel, DraftHead]:
    """A target and a good head for it."""
    target = train_target(generator)
    rope = {"rope_type": "default", "rope_theta": BASE}
    head = DraftHead.from_target(target, V, feature_layers=LAYERS, rope_parameters=rope).train()
    with torch.no_grad():  # as uneven as in real heads, so that the residual before it is not the one behind it
        head.layers[0].hidden_norm.weight.copy_(2 * torch.randn(32, generator=generator))

    def loss() -> Tensor:
        texts = periodic_texts(16, generator)
        with torch.no_grad(), FeatureTap(target, LAYERS) as tap, tap.record() as features:
            target(texts)
        levels = unroll(head.bind(target, head), features.concatenated(), texts, DEPTHS)
        return loss_of(levels, head.lm_head, texts)

    fit(head, loss)
    return target, head.eval()


def loss_of(levels: Iterable[Tensor], output_head: nn.Module, texts: Tensor) -> Tensor:
    """Of all levels of drafts below the first period."""
    losses = [
        F.cross_entropy(output_head(level[:, PERIOD : -2 - depth]).mT, texts[:, PERIOD + 2 + depth :])
        for depth, level in enumerate(levels)
    ]
    return torch.stack(losses).sum()


def pair_of(folder: Path, train: Callable[[torch.Generator], tuple[PreTrainedModel, Any]], answers: int = 24) -> Pair:
    """What was trained, by one thread: these matrices are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    target, head = train(generator)
    head.save_pretrained(folder)
    torch.set_num_threads(threads)
    return target, folder, [LabelledText(text, PERIOD + 1) for text in periodic_texts(answers, generator)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("head"), train)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ({}, {}),
        ({"feature_layers": [2, 3, 4]}, {"feature_layers": LAYERS}),
        ({"feature_layers": [0, 1, 2]}, {"feature_layers": LAYERS}),
        ({"rope_theta": 1e6}, {"rope_theta": BASE}),
        ({"rope_theta": 30.0}, {"rope_theta": BASE}),
        ({"norm_before_residual": True}, {"norm_before_residual": False}),
        (
            {"feature_layers": [2, 3, 4], "rope_theta": 1e6, "norm_before_residual": True},
            {"feature_layers": LAYERS, "rope_theta": BASE, "norm_before_residual": False},
        ),
    ],
    ids=str,
)
def test_a_planted_fault_is_found_and_its_cure_named(fault: dict[str, Any], cure: dict[str, Any], pair: Pair) -> None:
    target, folder, answers = pair
    found = diagnose(target, DraftHead.from_pretrained(folder, target=target, **fault), answers)
    assert found.overrides == cure and found.is_healthy is (not fault)
    assert all(f"{key}={value!r}" in found.verdict for key, value in cure.items())
    if fault:
        mended = DraftHead.from_pretrained(folder, target=target, **{**fault, **found.overrides})
        assert diagnose(target, mended, answers).is_healthy


@torch.no_grad()
def test_agreement_is_what_a_drafted_chain_would_have(pair: Pair) -> None:
    """Against the engine's own cache, one true prefix and one chain at a time."""
    target, folder, answers = pair
    head = DraftHead.from_pretrained(folder, target=target, feature_layers=[2, 3, 4])  # good, but not all right
    bound = BoundHead(head, target)
    hits = torch.zeros(DEPTHS)
    kept = positions = 0
    for answer in answers[:3]:
        states = target(answer.tokens[None], output_hidden_states=True)
        features = torch.cat([states.hidden_states[layer] for layer in (2, 3, 4)], dim=-1)
        picks = states.logits[0].argmax(-1)
        for slot in range(answer.prompt_length - 2, LENGTH - DEPTHS):
            cache = DraftCache()
            embedded = bound.embed(answer.tokens[None])
            rope = head.rope(torch.arange(LENGTH)[None])
            attend = cache.attend(0, slot + 1)
            hidden = head(
                head.fuse(features[:, : slot + 1]), embedded[:, 1 : slot + 2], rope.at(slice(slot + 1)), attend
            )
            chain = []
            for depth in range(DEPTHS):
                guess = bound.target_ids(bound.logits(hidden[:, -1:]).argmax(-1))
                chain.append(bool(guess == picks[slot + 1 + depth]))
                here, token = slot + 1 + depth, slot + 2 + depth
                if depth < DEPTHS - 1:
                    attend = cache.attend(here, here + 1)
                    fed = head.feedback(hidden[:, -1:])
                    hidden = head(fed, embedded[:, token : token + 1], rope.at(slice(here, here + 1)), attend)
            hits += torch.tensor(chain)
            kept += next((i for i, hit in enumerate(chain) if not hit), DEPTHS)
            positions += 1
    score = diagnose(target, head, answers[:3]).configured
    assert score.agreement == pytest.approx((hits / positions).tolist()) and 0.3 < min(score.agreement) < 0.99
    assert score.accepted == pytest.approx(kept / positions)


def test_too_few_answers_and_strangers_are_said_so(pair: Pair) -> None:
    target, folder, answers = pair
    head = DraftHead.from_pretrained(folder, target=target)
    with pytest.raises(ValueError, match="1 of 2 answers have at least 4 tokens.*at least 2 are needed"):
        diagnose(target, head, [answers[0], LabelledText(answers[0].tokens[:10], 8)])
    with torch.no_grad():
        head.lm_head.weight.zero_()
    assert "No settings make this head agree" in diagnose(target, head, answers).verdict


def test_the_bias_of_a_borrowed_output_head_is_scored_and_an_error_leaves_each_layers_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Phi's output head has a bias; here one that outvotes all hidden states."""
    config = PhiConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    target = PhiForCausalLM(config).train()
    target.model.layers[0].eval()
    target.lm_head.bias.data[5] = 1e4
    answers = [LabelledText(torch.arange(3, 15), 4)] * 2
    found = diagnose(target, DraftHead.from_target(target), answers)
    assert found.configured.agreement == (1.0,) * DEPTHS and target.training
    monkeypatch.setattr(target, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diagnose(target, DraftHead.from_target(target), answers)
    assert target.training and not target.model.layers[0].training


def test_readings_share_the_weights_and_pack_none_of_them(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    target, folder, answers = pair
    head, heads = DraftHead.from_pretrained(folder, target=target), []

    def bound(head: DraftHead, target: PreTrainedModel, *how: Any) -> BoundHead:
        heads.append(head)
        return BoundHead(head, target, *how)

    monkeypatch.setattr(PackedWeight, "blocks", lambda self, weight: 1 / 0)
    monkeypatch.setattr(DraftHead, "bind", bound)
    diagnose(target, head, answers)
    assert len(heads) > 10
    assert all(one.fc.weight.data_ptr() == head.fc.weight.data_ptr() for one in heads)


def test_answers_are_what_generate_writes_one_by_one(pair: Pair) -> None:
    target, _, answers = pair
    prompts = [answer.tokens[: 8 + index] for index, answer in enumerate(answers[:5])]
    for prompt, written in zip(prompts, write_answers(target, prompts, 6, batch=3), strict=True):
        alone = target.generate(prompt[None], do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
        assert written.prompt_length == len(prompt) and torch.equal(written.tokens, alone)


def test_the_command_prints_a_table_and_leaves_by_the_verdict(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, folder, _ = pair
    target.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    command = ["doctor", str(tmp_path), str(folder), "--device", "cpu", "--max-new-tokens", "12", "--answers", "12"]
    status = main([*command, "--set", "feature_layers=[2,3,4]"])
    printed, told = capsys.readouterr()
    assert "12/12 answers: " in told, "on a pipe, too"
    assert re.search(r">[ *]2, 3, 4 +10000 +no +0\.\d+", printed) and status in (0, 1)
    assert printed.startswith(("The head", "Too little evidence")) and "`--thorough` reads all answers" in printed
    tried, shown = 12, len(re.findall(r"^[> ][* ]\d, \d, \d ", printed, re.MULTILINE))
    assert ("readings were far worse" in printed) is (shown < tried)
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 12 and found["readings"][0].keys() >= {"feature_layers", "agreement", "is_best"}
    assert main([*command, "--set", "rope_theta"]) == 2
    assert main(["doctor", str(tmp_path), str(tmp_path)]) == 2
    assert "resps doctor:" in capsys.readouterr().err


def test_the_first_verdict_is_of_few_short_answers_and_the_last_is_that_of_all(pair: Pair) -> None:
    target, folder, answers = pair
    asked = []

    def source(first: int, end: int, most: int) -> list[LabelledText]:
        asked.append((first, end, most))
        return [
            LabelledText(text.tokens[: text.prompt_length + most], text.prompt_length) for text in answers[first:end]
        ]

    head = DraftHead.from_pretrained(folder, target=target, feature_layers=[2, 3, 4], norm_before_residual=True)
    found = list(refined(target, head, source, 24, 60))
    assert asked == [(0, 8, 48), (0, 10, 60), (10, 20, 60), (20, 24, 60)][: len(asked)]
    assert [one.answers for one in found] == [8, 10, 20, 24][: len(found)]
    whole = diagnose(target, head, answers)
    assert found[-1].overrides == whole.overrides and found[-1].is_settled is (len(found) == 3)
    assert len(found[1].scores) < len(found[0].scores) and found[1].configured.reading == whole.configured.reading


def test_an_examination_ends_in_time_and_short_answers_of_the_first_look_count(pair: Pair, fake_clock: Any) -> None:
    """Each answer takes two seconds, so that after the first eight there is time for four more."""
    target, folder, answers = pair
    asked = []

    def source(first: int, end: int, most: int) -> list[LabelledText]:
        asked.append((first, end))
        fake_clock.advance(2.0 * (end - first))
        return answers[first:end]

    head = DraftHead.from_pretrained(folder, target=target, feature_layers=[2, 3, 4])
    found = list(refined(target, head, source, 24, 20, seconds=25.0, clock=fake_clock))
    assert asked == [(0, 8), (8, 12)] and [one.answers for one in found] == [8, 12]
    whole = diagnose(target, head, answers[:12])
    assert found[-1].configured.agreement == whole.configured.agreement and found[-1].overrides == whole.overrides


@pytest.mark.parametrize("signalled", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_signal_after_the_first_verdict_prints_the_last_one(
    rounds: int,
    signalled: str,
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, folder, _ = pair
    target.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    calls = []

    def stopped(*given: Any) -> list[LabelledText]:
        calls.append(given)
        if len(calls) > rounds:
            signal.raise_signal(signal.Signals[signalled])
        return write_answers(*given)

    monkeypatch.setattr("transformers_resps.tools.doctor.write_answers", stopped)
    assert main(["doctor", str(tmp_path), str(folder), "--device", "cpu", "--answers", "12"]) == 130
    printed = capsys.readouterr()
    assert ("resps doctor: stopped before the first verdict." in printed.err) is (rounds == 0)
    assert printed.err.count("8/12 answers: ") == rounds and printed.out.count("* best") == rounds
