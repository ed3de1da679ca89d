"""Texts that cross a window, a chunk, the head's trained length or the limit: always the text of plain `generate`."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, Observation, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.generation.output import left_padded
from transformers_resps.policies.auto import default_policy
from transformers_resps.telemetry import RowCounts, StepRecord


WIDE = FixedPolicy(TreeShape(40, 4, VOCABULARY))
BOTH = FixedPolicy(TreeShape(24, 3, VOCABULARY, lookup=6))
WINDOW = 8
WINDOWS = [each for each in ARCHITECTURES if each.config.get("sliding_window")]


def text(length: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def check_plain_text(target: Any, prompt: torch.Tensor, head: DraftHead, policy: Any = WIDE, **options: Any) -> Any:
    options = {"max_new_tokens": 12, **options}
    plain = target.generate(prompt, **options)
    out = target.generate(prompt, assistant_model=head, policy=policy, return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == plain.tolist()
    return out.speculation


@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
def test_a_tree_may_stand_anywhere_around_the_window(architecture: Architecture) -> None:
    """Prompts that end before, at and behind the window's edge, read at once and in chunks that cut it."""
    target = attach(architecture.build(architecture.attention[0]))
    head = DraftHead.from_target(target)
    accepted = 0
    for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW):
        for chunk in (None, 3, WINDOW + 2):
            if chunk is None or chunk < length:
                report = check_plain_text(target, text(length), head, BOTH, prefill_chunk_size=chunk)
                accepted += report.emitted_total - report.target_forwards
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.fixture(scope="module")
def long_target() -> PreTrainedModel:
    """Reads 8,192 positions; its head was made for 64."""
    config = {"max_position_embeddings": 8192, "num_hidden_layers": 2}
    return attach(Architecture("llama", config).build("sdpa").float())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500, 8000])
@pytest.mark.parametrize("chunk", [None, 512])
def test_prompts_of_one_to_eight_thousand_tokens(long_target: PreTrainedModel, length: int, chunk: int | None) -> None:
    if chunk and length <= chunk:
        pytest.skip("one chunk is no chunk")
    head = DraftHead.from_target(long_target, feature_layers=[0, 1, 2], max_position_embeddings=64)
    options = {"prefill_chunk_size": chunk, "max_new_tokens": 8}
    plain = long_target.generate(text(length), **options)
    for policy in (BOTH, "auto"):
        found = long_target.generate(text(length), assistant_model=head, policy=policy, **options)
        assert found.tolist() == plain.tolist()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_a_head_outlives_its_trained_length_with_any_rope(long_target: PreTrainedModel, rope: dict[str, Any]) -> None:
    parameters = {"rope_theta": 1e4, "original_max_position_embeddings": 64, **rope}
    head = DraftHead.from_target(
        long_target, feature_layers=[0, 1, 2], max_position_embeddings=64, rope_parameters=parameters
    )
    for length in (50, 300):
        check_plain_text(long_target, text(length), head, max_new_tokens=24)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.9}], ids=["greedy", "sampled"])
def test_a_head_that_sees_the_newest_alone_leaves_the_text_as_it_is(
    long_target: PreTrainedModel, sampling: dict[str, Any]
) -> None:
    """Rows of one text and of several, padded and ragged, read at once, in chunks and from a cache handed back."""
    head = DraftHead.from_target(long_target, feature_layers=[0, 1, 2], sliding_window=20)
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, "pad_token_id": 0, **sampling}
    accepted = 0
    for lengths, chunk in (([5], None), ([20], None), ([300], 64), ([90, 7, 30], None), ([21, 60], 16)):
        ids, mask = left_padded([text(length)[0] for length in lengths])
        turns: list[Any] = []
        for drafting in ({}, {"assistant_model": head, "policy": BOTH}):
            set_seed(3)
            call = options | drafting | {"prefill_chunk_size": chunk}
            turns.append(long_target.generate(ids, attention_mask=mask, **call))
        assert turns[1].sequences.tolist() == turns[0].sequences.tolist()
        accepted += turns[1].speculation.emitted_total - turns[1].speculation.target_forwards
        if len(lengths) == 1 and not sampling:
            longer = torch.cat([turns[0].sequences, text(50)], dim=1)
            call = options | {"attention_mask": torch.ones_like(longer)}
            plain = long_target.generate(longer, **call).sequences
            call |= {CACHE_KEYWORD: turns[1][CACHE_KEYWORD], "assistant_model": head, "policy": BOTH}
            assert long_target.generate(longer, **call).sequences.tolist() == plain.tolist()
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


def test_the_guard_notices_a_head_beyond_its_trained_length() -> None:
    """Three accepted of every step up to position 2,048, none behind it; a drafted step costs 1.8 plain ones."""
    policy = default_policy()
    context, plain, drafted, lost = 1900, 1.0, 1.8, []
    for step in range(1200):
        shape = policy.choose(Observation(torch.zeros(1, 3), context, step, 9000, list))
        levels, accepted = 0, 0
        seconds, nodes = plain, 1
        if shape.asks_head:
            levels, nodes, seconds = 3, 8, drafted
            accepted = 3 if context < 2048 else 0
            policy.size(torch.full((1, 7), -0.3), torch.tensor([1, 1, 1, 1, 2, 2, 2]))
        counts = (RowCounts([accepted]), RowCounts([accepted + 1]))
        record = StepRecord(shape, levels * 4, nodes, *counts, 0.2 * bool(levels), seconds, seconds)
        policy.observe(record)
        lost.append((context, seconds - plain * (accepted + 1)))
        context += accepted + 1
    assert sum(loss for at, loss in lost if at < 2048) < -40, "the good head was not used: the test shows nothing"
    beyond = [loss for at, loss in lost if at >= 2048]
    assert len(beyond) > 900
    assert sum(beyond) < 0.04 * len(beyond), "the guard kept paying for a head that reads nothing"


@pytest.mark.parametrize("most", range(1, 13))
@pytest.mark.parametrize("by", ["max_new_tokens", "max_length"])
def test_the_limit_may_fall_on_any_step_of_a_tree(long_target: PreTrainedModel, most: int, by: str) -> None:
    head = DraftHead.from_target(long_target, feature_layers=[0, 1, 2])
    limit = {"max_new_tokens": most} if by == "max_new_tokens" else {"max_new_tokens": None, "max_length": 5 + most}
    for policy in (WIDE, FixedPolicy(TreeShape(13, 12, 1)), FixedPolicy(TreeShape(1, 0, 1, lookup=12))):
        report = check_plain_text(long_target, text(5), head, policy, **limit)
        assert report.emitted_total == most


GEMMA = "RESPS_GEMMA"


@pytest.mark.real
def test_gemma_3_across_its_window_of_512() -> None:
    """Gemma 3 270M, real weights: 15 of its 18 layers see 512 positions. The prompt ends before the edge."""
    folder = Path(os.environ.get(GEMMA, ""))
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{GEMMA} names no folder with the weights of Gemma 3 270M, which our install does not bring")
    target = attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert target.config.sliding_window == 512
    torch.manual_seed(0)
    head = DraftHead.from_target(target)
    passage = text(60, 20000)[0].tolist()
    prompt = torch.tensor([(passage * 9)[:505]])  # repeats itself, so that lookups are accepted
    policy = FixedPolicy(TreeShape(4, 2, 2, lookup=6))
    report = check_plain_text(target, prompt, head, policy, max_new_tokens=24, do_sample=False)
    assert report.emitted_total > report.target_forwards, (
        "no drafted token was ever accepted: the comparison proved nothing"
    )
