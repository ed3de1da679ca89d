"""Encoder-decoders draft by lookup alone, and write what plain `generate` writes with the same seed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.generation.utils import GenerateEncoderDecoderOutput

from tests.decoding.rows import Noted
from tests.lossless.answering import Heard
from tests.targets import SIZES, VOCABULARY, Architecture
from transformers_resps import DraftHead, TreeShape, assert_lossless, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.generation.keywords import SpeculationDefaults
from transformers_resps.tree import DraftTree


TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {
    **TOKENS,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.8,
}
TABLE = {"max_position_embeddings": 64}
T5 = {
    **TOKENS,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 3.0,
    "tie_word_embeddings": False,
}
SPEECH = {**LAYERS, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64}
LED = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODULE = SIZES | TOKENS | WINDOWS | {"num_hidden_layers": 2, "query_pre_attn_scalar": 8, "initializer_range": 0.6}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "longt5": T5,
    "switch_transformers": T5 | {"num_experts": 2, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1},
    "bart": LAYERS | TABLE,
    "mbart": LAYERS | TABLE,
    "pegasus": LAYERS | TABLE,
    "blenderbot": LAYERS | TABLE,
    "marian": LAYERS | TABLE,
    "m2m_100": LAYERS | TABLE,
    "led": LAYERS | LED,
    "t5gemma": {"encoder": MODULE, "decoder": MODULE | {"cross_attention_hidden_size": 32}} | TOKENS,
    "whisper": SPEECH,
    "speech_to_text": SPEECH | {"input_feat_per_channel": 8, "conv_channels": 16},
    "moonshine": MODULE | {"layer_types": None, "sliding_window": None, "decoder_start_token_id": 1},
}
SOUNDS = {
    "whisper": ("input_features", (8, 64)),
    "speech_to_text": ("input_features", (64, 8)),
    "moonshine": ("input_values", (2000,)),
}
WITHOUT_SDPA = ("longt5", "switch_transformers", "led", "t5gemma", "speech_to_text")
TAKES_POSITIONS = ("t5gemma", "whisper", "moonshine")


@cache
def target_of(model_type: str, **changes: Any) -> Any:
    """Attached, in fp64, so that rounding can hide nothing."""
    settings: dict[str, Any] = CONFIGS[model_type] | changes
    if model_type == "t5gemma":  # which takes them out of the dict
        settings = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    config = AutoConfig.for_model(model_type, **settings)
    attention = "eager" if model_type in WITHOUT_SDPA else "sdpa"
    maker: Any = AutoModelForSpeechSeq2Seq if model_type in SOUNDS else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    target = maker.from_config(config, attn_implementation=attention).double().eval()
    target.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=2, bos_token_id=1, decoder_start_token_id=1, max_length=40
    )
    return attach(target)


def inputs_of(model_type: str, rows: int) -> dict[str, torch.Tensor]:
    """Texts, of which the second is padded, or sounds."""
    generator = torch.Generator().manual_seed(3)
    if model_type in SOUNDS:
        name, shape = SOUNDS[model_type]
        return {name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, VOCABULARY, (rows, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, 8:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Chains(Noted):
    """Looks up chains, and notes what it sees."""

    def __init__(self, lookup: int = 6) -> None:
        super().__init__(TreeShape(1, 0, 1, lookup))
        self.trees: list[DraftTree] = []

    def on_verified(self, tree: DraftTree, *args: Any) -> None:
        self.trees.append(tree)


def both(target: Any, inputs: dict[str, Any], policy: Any = None, **options: Any) -> list[Any]:
    """The outputs of the same call, plain and speculative; their random states are equal."""
    outputs, states = [], []
    for extra in ({}, {"policy": policy or Chains()}):
        torch.manual_seed(5)
        outputs.append(target.generate(**inputs, **options, **extra))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "drafting drew from the global generator"
    return outputs


@pytest.mark.parametrize("model_type", CONFIGS)
def test_chains_write_what_plain_decoding_writes(model_type: str) -> None:
    """One row and several, which end apart; greedy and sampled; any processor."""
    target, policy = target_of(model_type), Chains()
    options: list[dict[str, Any]] = [
        {"eos_token_id": None},
        {"eos_token_id": [3, 5, 8]},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "temperature": 1.6, "eos_token_id": [3, 5]},
    ]
    for rows in (1, 3):
        for own in options:
            plain, found = both(target, inputs_of(model_type, rows), policy, max_new_tokens=20, **own)
            assert found.tolist() == plain.tolist()
    assert policy.accepted > 0
    assert all(
        torch.equal(tree.depths, torch.arange(tree.node_count)[None]) for tree in policy.trees if len(tree.tokens) == 1
    )


def test_bert_writes_with_bert() -> None:
    part = Architecture("bert", {"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "max_position_embeddings": 64})
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("bert", **sizes, num_attention_heads=4, **part.config)
    decoder = AutoConfig.for_model(
        "bert", **sizes, num_attention_heads=4, is_decoder=True, add_cross_attention=True, **part.config
    )
    whole = AutoConfig.for_model(
        "encoder-decoder", encoder=config.to_dict(), decoder=decoder.to_dict(), decoder_start_token_id=1
    )
    target = attach(EncoderDecoderModel(whole).double().eval())
    target.generation_config.pad_token_id = 0
    policy = Chains()
    plain, found = both(target, inputs_of("bert", 2), policy, max_new_tokens=16, decoder_start_token_id=1)
    assert found.tolist() == plain.tolist() and policy.accepted > 0


class Quoting(LogitsProcessor):
    """Lets each row write the tokens of its source."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        place = input_ids.shape[1] - 1
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in zip(forced, self.rows, strict=True):
            row[tokens[place % len(tokens)]] = 0
        return forced


@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_that_quotes_its_source_takes_few_steps(rows: int) -> None:
    """Of a source without a repetition the text alone says nothing."""
    ids = torch.tensor([[9, 4, 16, 11, 3, 7, 18, 5, 13, 6], [8, 3, 12, 10, 14, 4, 9, 17, 0, 0]])
    inputs = {"input_ids": ids[:rows], "attention_mask": (ids > 0).long()[:rows]}
    rows_quoted = [row[row > 0].tolist() for row in ids[:rows]]
    processor, policy = LogitsProcessorList([Quoting(rows_quoted)]), Chains()
    plain, found = both(target_of("t5"), inputs, policy, logits_processor=processor, max_new_tokens=8)
    assert found.tolist() == plain.tolist() == [[1, *row[:8]] for row in rows_quoted]
    assert len(policy.steps) <= 3


def test_tokens_of_another_vocabulary_are_no_source() -> None:
    target = target_of("marian", decoder_vocab_size=VOCABULARY + 1, share_encoder_decoder_embeddings=False)
    ids = torch.tensor([[9, 4, 16, 11, 3, 7, 18, 5]])
    policy = Chains()
    processor = LogitsProcessorList([Quoting(ids.tolist())])
    plain, found = both(target, {"input_ids": ids}, policy, logits_processor=processor, max_new_tokens=7)
    assert found.tolist() == plain.tolist() and policy.accepted == 0


def test_answers_of_one_row_share_its_source() -> None:
    target, policy = target_of("bart"), Chains()
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 16, "temperature": 1.5}
    plain, found = both(target, inputs_of("bart", 2), policy, **options)
    assert plain.shape[0] == 6 and found.tolist() == plain.tolist()
    assert any(tree.node_count > 1 for tree in policy.trees)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("rows", [1, 2])
def test_outputs_are_those_of_stock(model_type: str, rows: int) -> None:
    target = target_of(model_type)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 12}
    plain, found = both(target, inputs_of(model_type, rows), eos_token_id=[3, 5], **options)
    assert isinstance(found, GenerateEncoderDecoderOutput) and set(found) == set(plain)
    assert found.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        for ours, stock in zip(found[name], plain[name], strict=True):
            torch.testing.assert_close(ours, stock)
    kept = next(value for name, value in found.items() if isinstance(value, EncoderDecoderCache))
    stock_kept = next(value for name, value in plain.items() if isinstance(value, EncoderDecoderCache))
    for part in ("self_attention_cache", "cross_attention_cache"):
        for ours, stock in zip(getattr(kept, part).layers, getattr(stock_kept, part).layers, strict=True):
            assert type(ours) is type(stock)
            torch.testing.assert_close(ours.keys, stock.keys)


def test_the_report_comes_with_the_output() -> None:
    found = target_of("t5").generate(**inputs_of("t5", 1), policy="auto", return_dict_in_generate=True)
    steps = found.speculation.steps
    assert sum(sum(step.emitted) for step in steps) == found.sequences.shape[1] - 1
    assert not any(step.shape.asks_head for step in steps)


def test_a_text_goes_on_from_its_cache() -> None:
    target, inputs = target_of("bart"), inputs_of("bart", 1)
    first = target.generate(
        **inputs, policy=Chains(), eos_token_id=None, max_new_tokens=8, return_dict_in_generate=True
    )
    expected = target.generate(**inputs, eos_token_id=None, max_new_tokens=20)
    (cache,) = (value for value in first.values() if isinstance(value, EncoderDecoderCache))
    longer = {
        "decoder_input_ids": first.sequences,
        "decoder_attention_mask": torch.ones_like(first.sequences),
        CACHE_KEYWORD: cache,
    }
    found = target.generate(**inputs, **longer, policy=Chains(), eos_token_id=None, max_new_tokens=12)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("model_type", ["t5", "mbart", "whisper"])
def test_a_decoder_may_begin_with_a_prompt(model_type: str) -> None:
    """Of rows of other lengths, too: Whisper counts positions from the first token, the others from the padding."""
    prompts = torch.tensor([[1, 7, 4, 9], [0, 0, 1, 12]])
    given = {"decoder_input_ids": prompts, "decoder_attention_mask": (prompts > 0).long()}
    inputs = inputs_of(model_type, 2) | given
    for own in ({}, {"do_sample": True, "temperature": 1.4}):
        policy = Chains()
        plain, found = both(target_of(model_type), inputs, policy, max_new_tokens=20, eos_token_id=None, **own)
        assert found.tolist() == plain.tolist()
    one = {name: value[:1] for name, value in inputs.items()}
    plain, found = both(target_of(model_type), one, max_new_tokens=20, forced_bos_token_id=6, forced_eos_token_id=2)
    assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_rows_advance_apart_where_the_decoder_takes_positions(model_type: str) -> None:
    target, inputs = target_of(model_type), inputs_of(model_type, 2)
    call = {"policy": Chains(), "lockstep": False, "max_new_tokens": 4}
    if model_type in TAKES_POSITIONS:
        assert target.generate(**inputs, **call).shape[0] == 2
    else:
        with pytest.raises(ValueError, match="`lockstep=False` does not work with a decoder that counts the slots"):
            target.generate(**inputs, **call)


def test_a_streamer_gets_every_token() -> None:
    streamer = Heard()
    found = target_of("t5").generate(**inputs_of("t5", 1), policy=Chains(), streamer=streamer, max_new_tokens=12)
    heard = torch.cat([torch.tensor(value).flatten() for value in streamer.values])
    assert heard.tolist() == found[0].tolist() and streamer.ended == 1


@pytest.mark.parametrize("model_type", ["bart", "led", "whisper"])
def test_drafts_end_with_the_table_of_positions(model_type: str) -> None:
    """A text that ends before them may be allowed to be longer."""
    target, inputs = target_of(model_type), inputs_of(model_type, 1)
    begin = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.tensor([[7, 8, 9] * 20])], dim=1)  # 61 of 64
    forced = LogitsProcessorList([Quoting([[7, 8, 9]])])
    call = {"decoder_input_ids": begin, "logits_processor": forced, "max_length": 120, "eos_token_id": 9}
    policy = Chains(16)
    plain, found = both(target, inputs, policy, **call)
    assert found.tolist() == plain.tolist() and len(policy.trees) > 0


@pytest.mark.parametrize("positions", [6, 7, 9])
def test_a_table_of_few_positions_is_probed_within_them(positions: int) -> None:
    target = target_of("whisper", max_target_positions=positions)
    plain, found = both(target, inputs_of("whisper", 1), Chains(4), max_length=positions, eos_token_id=None)
    assert found.tolist() == plain.tolist()


def test_a_small_assistant_stays_stocks_own() -> None:
    target, assistant = target_of("t5"), target_of("t5", num_layers=1)
    inputs, options = inputs_of("t5", 1), {"max_new_tokens": 12, "eos_token_id": None}
    plain = target.generate(**inputs, **options)
    assert target.generate(**inputs, **options, assistant_model=assistant).tolist() == plain.tolist()


def test_compiling_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    target, inputs = target_of("bart"), inputs_of("bart", 1)
    plain = target.generate(**inputs, max_new_tokens=8)
    assert target.generate(**inputs, policy=Chains(), compile=True, max_new_tokens=8).tolist() == plain.tolist()
    assert "encoder-decoder" in caplog.text


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "head": ("t5", {}, "a head needs a decoder-only target"),
    "static cache": ("bart", {"cache_implementation": "static"}, "cache_implementation='static'"),
    "another cache": ("bart", {CACHE_KEYWORD: DynamicCache}, "`EncoderDecoderCache`"),
    "beams": ("bart", {"num_beams": 2}, "Set `num_beams=1`"),
    "unknown argument": ("bart", {"decoder_inputs_embeds": torch.zeros(1, 1, 32)}, "decoder_inputs_embeds"),
    "timestamps of words": ("whisper", {"return_token_timestamps": True}, "return_token_timestamps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_drafts_cannot_do_is_refused(case: str) -> None:
    model_type, options, message = REFUSED[case]
    target = target_of(model_type)
    made = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    drafting: dict[str, Any] = {"policy": Chains()}
    if case == "head":
        drafting = {"assistant_model": DraftHead.from_target(Architecture("llama").build("sdpa"))}
    with pytest.raises(ValueError, match=message):
        target.generate(**inputs_of(model_type, 1), **drafting, **made)


def test_a_compiled_target_is_refused() -> None:
    target = target_of("pegasus", encoder_layers=1)
    target.forward = torch.compile(target.forward, backend="eager")
    with pytest.raises(ValueError, match="PegasusForConditionalGeneration.*was compiled"):
        target.generate(**inputs_of("pegasus", 1), policy=Chains())


PROPHET: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "encoder_ffn_dim": 48,
    "num_encoder_layers": 1,
    "num_encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_decoder_layers": 1,
    "num_decoder_attention_heads": 4,
}
FSMT: dict[str, Any] = {name: value for name, value in LAYERS.items() if name != "vocab_size"} | {
    "src_vocab_size": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "langs": ["en", "de"],
    "num_beams": 1,
}
MOE = LAYERS | {"num_experts": 2}
SWITCH = CONFIGS["switch_transformers"] | {"expert_capacity": 4}
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "prophetnet": (PROPHET, "`decoder_input_ids` of length 1"),
    "fsmt": (FSMT, "gives logits that differ by"),
    "nllb-moe": (MOE, "by the mask of the last one"),
    "switch_transformers": (SWITCH, "an expert takes 4"),
}


@pytest.mark.parametrize("model_type", UNFIT)
def test_a_family_whose_chains_would_write_another_text_is_refused(model_type: str) -> None:
    config, message = UNFIT[model_type]
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **config)
    target: Any = AutoModelForSeq2SeqLM.from_config(made, attn_implementation="eager").eval()
    target.generation_config.num_beams = 1
    attach(target, policy="auto")
    with pytest.raises(ValueError, match=message):
        target.generate(**inputs_of(model_type, 1), max_new_tokens=4, decoder_start_token_id=1)


def test_the_proof_kit_takes_decoders_alone() -> None:
    with pytest.raises(ValueError, match="causal LM, got T5ForConditionalGeneration"):
        assert_lossless(target_of("t5"), policy=Chains())


def test_a_class_that_prepares_its_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Musicgen does, which masks the tokens of other codebooks there."""
    target = target_of("bart")
    monkeypatch.setattr(type(target), "prepare_inputs_for_generation", lambda *_, **__: {}, raising=False)
    with pytest.raises(ValueError, match="prepares each step in a way of its own"):
        target.generate(**inputs_of("bart", 1), policy=Chains())


def test_a_trainer_predicts_with_a_policy(tmp_path: Path) -> None:
    """`Seq2SeqTrainer` hands the labels over, too."""
    target = target_of("t5")
    rows = [{name: value[0] for name, value in inputs_of("t5", 1).items()} | {"labels": torch.tensor([7, 8, 2])}]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, report_to="none", use_cpu=True, generation_max_length=12
    )
    trainer = Seq2SeqTrainer(model=target, args=arguments)
    plain = trainer.predict(rows, max_length=12).predictions
    attach(target, policy=Chains())
    try:
        assert trainer.predict(rows, max_length=12).predictions.tolist() == plain.tolist()
    finally:
        target.speculation_state.defaults = SpeculationDefaults()


WHISPER = {
    "vocab_size": 81,
    "pad_token_id": 40,
    "bos_token_id": 40,
    "eos_token_id": 40,
    "decoder_start_token_id": 41,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SPOKEN: dict[str, dict[str, Any]] = {
    "text": {},
    "translation": {"language": "en", "task": "translate"},
    "timestamps": {"return_timestamps": True},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "language": "de"},
    "segments": {"return_timestamps": True, "return_segments": True, "return_dict_in_generate": True},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
    "prompt": {"prompt_ids": torch.tensor([46, 5, 6, 7])},
}
FALLBACKS = {
    "condition_on_prev_tokens": True,
    "temperature": (0.0, 0.6, 1.0),
    "compression_ratio_threshold": 1.2,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.5,
    "return_segments": True,
}


@cache
def whisper() -> Any:
    """With tokens for languages, tasks and 33 timestamps, and sounds of 64 frames at most."""
    target = target_of("whisper", **WHISPER)
    target.generation_config = GenerationConfig(
        pad_token_id=40,
        eos_token_id=40,
        decoder_start_token_id=41,
        max_length=24,
        no_timestamps_token_id=47,
        prev_sot_token_id=46,
        lang_to_id={"<|en|>": 42, "<|de|>": 43},
        task_to_id={"transcribe": 44, "translate": 45},
        is_multilingual=True,
        max_initial_timestamp_index=10,
        suppress_tokens=[1, 2],
        begin_suppress_tokens=[3, 40],
    )
    return target


def flat(output: Any) -> list[Any]:
    """All tensors and numbers in what Whisper returns, caches included."""
    if isinstance(output, torch.Tensor):
        return [(tuple(output.shape), output.double().round(decimals=6).tolist())]
    if isinstance(output, EncoderDecoderCache):
        both = output.self_attention_cache.layers + output.cross_attention_cache.layers
        return [part for layer in both for part in flat(layer.keys)]
    if isinstance(output, dict):
        return [(name, flat(value)) for name, value in sorted(output.items())]
    if isinstance(output, list | tuple):
        return [flat(value) for value in output]
    return [output]


@pytest.mark.parametrize("case", SPOKEN)
@pytest.mark.parametrize("rows", [1, 2])
def test_whisper_writes_down_what_it_does_in_stock(case: str, rows: int) -> None:
    sounds = torch.randn(rows, 8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy = Chains()
    plain, found = both(whisper(), {"input_features": sounds}, policy, **SPOKEN[case])
    assert flat(found) == flat(plain) and policy.steps


@pytest.mark.parametrize("options", [{}, FALLBACKS], ids=["plain", "fallbacks"])
def test_whisper_hears_long_sounds_as_in_stock(options: dict[str, Any]) -> None:
    sounds = torch.randn(2, 8, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, 100:] = 0
    inputs = {"input_features": sounds, "attention_mask": mask, "language": "en", "return_timestamps": True}
    policy = Chains()
    plain, found = both(whisper(), inputs, policy, **options)
    assert flat(found) == flat(plain) and policy.accepted > 0
