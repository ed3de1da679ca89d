"""Every kind of target with every source, and with several in one call: any call writes what plain `generate` writes.

`RESPS_SOURCES=all` draws ten times as many calls, in about five minutes.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, set_seed

from tests.assistants.mtp_cases import CASES
from tests.drafting.test_block_drafter import block_head
from tests.lossless.answering import Heard, Restive
from tests.lossless.hybrids import AnyShape, check_counts, compare
from tests.pretend.pair import mtp, pair
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, Level, SpeculationReport, TreeShape, attach
from transformers_resps.assistants import MtpConfig, MtpHead
from transformers_resps.compat import CACHE_KEYWORD, HAS_RECURRENT_STATES
from transformers_resps.heads import BoundHead


ALL = os.environ.get("RESPS_SOURCES") == "all"
CALLS = 20 if ALL else 2  # of each mixture
VOCABULARY = 7  # so few that trees hold most pairs of tokens


@dataclass(frozen=True)
class Mixture:
    """A kind of target and the sources that draft for it in one call."""

    target: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.target}-{'+'.join(self.sources)}"


MIXTURES = [
    Mixture(target, tuple(sources.split("+")))
    for target, mixtures in {
        "foretold": "head mtp head+mtp+small",
        "qwen3": "head mtp 3mtp small head+mtp+small 3mtp+small block block+head+small",
        "Qwen3.5": "head mtp small mtp+small block block+mtp",
        "Qwen3-Next": "mtp 3mtp+head",
        "GLM-4.6": "3mtp small mtp+head",
        "DeepSeek-V3": "mtp small 3mtp+small",
        "gemma4": "assistant assistant+head assistant+small",
    }.items()
    for sources in mixtures.split()
]
MIXTURES += [Mixture("qwen3", ("parallel",)), Mixture("qwen3", ("parallel", "block"))]
MIXTURES.append(Mixture("Qwen3.5", ("parallel",)))
MTP: dict[tuple[str, str], dict[str, Any]] = {  # what a module does otherwise than most
    ("qwen3", "mtp"): {"draft_token_ids": (1, 2, 4, 6)},
    ("qwen3", "3mtp"): {"fed_back": "target"},
    ("GLM-4.6", "3mtp"): {"fed": "before", "fed_back": "before"},
    ("DeepSeek-V3", "mtp"): {"hidden_first": True, "zeroed_start": True},
    ("Qwen3-Next", "3mtp"): {"own_output_head": True},
}
EXPERTS = ("Qwen3-Next", "GLM-4.6", "DeepSeek-V3")
RECURRENT = ("Qwen3.5", "Qwen3-Next")


@torch.no_grad()
def redrawn(module: Any, seed: int, share: float = 1.0) -> Any:
    """Weights that matter: new ones, or with a `share` below 1 the old ones with some noise."""
    random = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        scale = 1 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.3
        kept = 1 if weight.dim() == 1 else math.sqrt(1 - share**2)
        weight.copy_(kept * weight + share * scale * torch.randn(weight.shape, generator=random))
    return module.eval()


@cache
def target_of(name: str) -> PreTrainedModel:
    if name in RECURRENT and not HAS_RECURRENT_STATES:
        pytest.skip("this release refuses targets with recurrent layers")
    if name == "foretold":
        return pair()[0]
    if name == "gemma4":
        pytest.importorskip("transformers.models.gemma4_assistant")
        from tests.assistants.gemma import gemma_target

        return attach(gemma_target(vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY))
    if name == "qwen3":
        return attach(Architecture("qwen3", {"vocab_size": VOCABULARY}).build("sdpa"))
    case = next(case for case in CASES if case.name == name)
    return attach(replace(case, config=case.config | {"vocab_size": VOCABULARY, "eos_token_id": None}).build())


@cache
def source_of(name: str, target_name: str) -> Any:
    target = target_of(target_name)
    torch.manual_seed(1)
    if name == "head":
        return pair()[1] if target_name == "foretold" else DraftHead.from_target(target)
    if name == "parallel":
        return redrawn(DraftHead.from_target(target, mask_token_id=2, parallel_levels=4, num_hidden_layers=2), 4)
    if name == "block":
        return block_head(target, correction="rnn", correction_rank=4, windows=[6, None]).to(target.dtype)
    if name == "assistant":
        from tests.assistants.gemma import gemma_assistant

        return gemma_assistant(vocab_size=VOCABULARY)
    if name == "small":
        if target_name in RECURRENT or target_name == "gemma4":
            return Architecture("llama", {"vocab_size": VOCABULARY}).build("sdpa", seed=1).to(target.dtype)
        return redrawn(copy.deepcopy(target), 1, share=0.1)
    if target_name == "foretold":
        return mtp(target)
    depths = 3 if name == "3mtp" else 1
    experts = (True,) * depths if target_name in EXPERTS else ()
    config = MtpConfig(depths, experts=experts, **MTP.get((target_name, name), {}))
    return redrawn(MtpHead(config, target).to(target.dtype), 2)


class AnyTree(AnyShape):
    """Stops drafting at any level, and verifies any number of nodes."""

    def grow(self, level: Level) -> bool:
        return self._number(0, 3) > 0

    def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
        return self._number(0, 40)


def grammar(row: int, text: torch.Tensor) -> list[int]:
    """A few tokens, of which the newest one decides."""
    return [(int(text[-1]) * 2 + step) % VOCABULARY for step in (1, 2, 4)]


EXTRAS: dict[str, Callable[[Random], dict[str, Any]]] = {
    "repetition": lambda random: {"repetition_penalty": random.choice([0.7, 1.3, 2.0])},
    "n-grams": lambda random: {"no_repeat_ngram_size": random.choice([2, 3])},
    "bad words": lambda random: {"bad_words_ids": [[3], [1, 4]]},
    "least length": lambda random: {"min_new_tokens": random.randint(2, 6), "eos_token_id": [1, 2]},
    "stateful": lambda random: {"logits_processor": LogitsProcessorList([Restive()])},
    "stop strings": lambda random: {"stop_strings": ["de", "bcb"], "tokenizer": letter_tokenizer()},
    "grammar": lambda random: {"prefix_allowed_tokens_fn": grammar},
    "chunks": lambda random: {"prefill_chunk_size": random.choice([1, 3])},
}


def call_of(number: int, vocabulary: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The inputs, options and keywords of ours that a number stands for, with new state at each reading."""
    random = Random(number)
    rows, length = random.choice([1, 1, 3]), random.randint(4, 9)
    pads = torch.tensor([[0], [random.randint(0, 3)], [length - 1]])[:rows]
    mask = (torch.arange(length) >= pads).long()
    ids = torch.tensor([[random.randrange(1, vocabulary) for _ in range(length)] for _ in range(rows)])
    options: dict[str, Any] = {"max_new_tokens": random.randint(6, 14), "eos_token_id": random.choice([None, [2]])}
    options |= {"pad_token_id": 0, "do_sample": random.random() < 0.5}
    if options["do_sample"]:
        options |= random.choice([{"temperature": 0.8}, {"temperature": 1.4, "top_k": 4}, {"top_p": 0.8}])
    for name in random.sample(sorted(EXTRAS), random.choice([0, 1, 1, 2])):
        if vocabulary == VOCABULARY or name not in ("stop strings", "grammar"):
            options |= EXTRAS[name](random)
    if rows == 1 and random.random() < 0.3:
        options["streamer"] = Heard()
    width = min(vocabulary, 8)
    policies = [
        FixedPolicy(TreeShape(40, 3, width)),
        FixedPolicy(TreeShape(6, 5, 1)),
        FixedPolicy(TreeShape(24, 2, width, lookup=5)),
        AnyShape(number, width),
        AnyTree(number, width),
        "auto",  # which may find nothing worth drafting
    ]
    ours = {"policy": random.choice(policies[: 5 + number % 2])}
    if rows > 1:
        ours["lockstep"] = random.choice([None, True])
    return {"input_ids": ids * mask, "attention_mask": mask}, options, ours


def turns(target: Any, number: int, sources: Any = None) -> tuple[list[Any], list[SpeculationReport]]:
    """What a call and perhaps a second turn from its cache write, stream and draw; plain without sources."""
    written: list[Any] = []
    reports: list[SpeculationReport] = []
    vocabulary = target.config.get_text_config().vocab_size
    inputs, options, _ = call_of(number, vocabulary)
    for turn in range(1 + number % 3 // 2):
        inputs_now, options, ours = call_of(number, vocabulary)
        inputs = inputs if turn else inputs_now
        if sources is not None:
            options |= ours | {"assistant_model": sources}
        set_seed(number)
        out = target.generate(**inputs, **options, return_dict_in_generate=True)
        written += [out.sequences.tolist(), torch.get_rng_state().tolist()]
        written += [vars(options["streamer"])] if "streamer" in options else []
        reports += [] if sources is None else [out.speculation]
        added = torch.tensor([[3, 5]]).expand(len(out.sequences), 2)
        mask = torch.ones(len(added), out.sequences.shape[1] + 2, dtype=torch.long)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        inputs = {"input_ids": torch.cat([out.sequences, added], dim=1), "attention_mask": mask}
        inputs[CACHE_KEYWORD] = out[CACHE_KEYWORD]
    return written, reports


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_calls_write_what_plain_generate_writes(mixture: Mixture) -> None:
    target = target_of(mixture.target)
    sources = [source_of(name, mixture.target) for name in mixture.sources]
    reports: list[SpeculationReport] = []
    for call in range(CALLS):
        number = (1000 if ALL else CALLS) * MIXTURES.index(mixture) + call
        plain, _ = turns(target, number)
        found, own = turns(target, number, sources if len(sources) > 1 else sources[0])
        assert found == plain, f"call {number}: {call_of(number, VOCABULARY)}"
        reports += own
    check_counts(*reports, in_a_row=1)
    assert sum(step.proposed.drafter + step.proposed.both for report in reports for step in report.steps) > 0


@pytest.mark.parametrize("layers", [[1, 3, 5], [6]], ids=str)
def test_a_head_gets_features_of_the_whole_prompt_from_layers_that_skip_it(layers: list[int]) -> None:
    """Gemma 4 computes layers without keys of their own for the last position alone, where nothing else is asked."""
    target = target_of("gemma4")
    head = DraftHead.from_target(target, feature_layers=layers)
    prompt = torch.tensor([[3, 4, 5, 6, 1, 2]])
    read: list[int] = []
    fuse = BoundHead.fuse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundHead, "fuse", lambda self, features: read.append(features.shape[1]) or fuse(self, features))
        compare(target, head, prompt, policy=FixedPolicy(TreeShape(8, 2, 4)))
    assert read[0] == prompt.shape[1]
