"""Every option of `generate`: with draft trees the texts are those of plain decoding."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from tests.lossless.answering import SAMPLING, WIDE, Restive, both
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": SAMPLING,
    "top-k": SAMPLING | {"top_k": 5},
    "top-p": SAMPLING | {"top_p": 0.8},
    "min-p": SAMPLING | {"min_p": 0.1},
    "typical": SAMPLING | {"typical_p": 0.8},
    "epsilon": SAMPLING | {"epsilon_cutoff": 0.02},
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition penalty, sampled": SAMPLING | {"repetition_penalty": 1.7},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[4], [7, 11]]},
    "suppressed tokens": {"suppress_tokens": [3, 8]},
    "sequence bias": {"sequence_bias": {(9,): 2.0}},
    "min new tokens": SAMPLING | {"min_new_tokens": 12},
    "forced end token": {"forced_eos_token_id": 2},
    "exponential decay": SAMPLING | {"exponential_decay_length_penalty": (4, 1.2)},
    "prefix constraint": SAMPLING
    | {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) + i) % 19 for i in (1, 3)]},
    "watermark": SAMPLING | {"watermarking_config": WatermarkingConfig()},
    "synthid": SAMPLING
    | {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 7, 11], context_history_size=8)},
    "guidance scale": {"guidance_scale": 1.5},
    "guidance scale, sampled": SAMPLING | {"guidance_scale": 1.5},
    "several end tokens": SAMPLING | {"eos_token_id": [2, 6, 12]},
    "one new token": {"max_new_tokens": 1},
    "two new tokens": {"max_new_tokens": 2},
    "half a new token": {"max_new_tokens": 12.5},
    "max_length in the middle of a tree": {"max_new_tokens": None, "max_length": 15},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "dynamic cache by name": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_nothing_about_losslessness(
    name: str, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    for seed in range(3):
        plain, tree = both(target, head, prompt, seed=seed, **OPTIONS[name])
        assert tree.sequences.tolist() == plain.sequences.tolist()


def test_scores_and_logits_are_those_of_plain_generate(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    wanted = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    plain, tree = both(target, head, prompt, **SAMPLING, **wanted)
    for name in ("scores", "logits"):
        ours, theirs = getattr(tree, name), getattr(plain, name)
        assert len(ours) == len(theirs)
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_of_a_padded_batch_finish_on_their_own(target: PreTrainedModel, head: DraftHead, do_sample: bool) -> None:
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 8, 5)):
        mask[row, :pads] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    lengths = set()
    for seed in range(6):
        plain, tree = both(target, head, inputs, seed=seed, do_sample=do_sample, eos_token_id=[2, 6])
        assert tree.sequences.tolist() == plain.sequences.tolist()
        lengths |= {int((row != 0).sum()) for row in tree.sequences[:, 9:]}
        assert tree.speculation.emitted_total == sum(sum(step.emitted) for step in tree.speculation.steps)
    assert len(lengths) > 1 or not do_sample


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 4), (8, 2), (8, 1), (4, 4)])
def test_a_chain_is_drafted_beside_padding_however_many_heads_share_keys(heads: int, key_heads: int) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    target = attach(Architecture("llama", sizes).build("sdpa"))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    plain, tree = both(target, DraftHead.from_target(target), inputs, TreeShape(4, 3, 1))
    assert tree.sequences.tolist() == plain.sequences.tolist()


class StopAfter(StoppingCriteria):
    """Stops each row at its own length, wherever in an accepted run that is."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.lengths[: len(input_ids)]


@pytest.mark.parametrize("length", range(8, 16))
def test_a_custom_criterion_stops_in_the_middle_of_an_accepted_run(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, length: int
) -> None:
    criteria = StoppingCriteriaList([StopAfter((length,))])
    plain, tree = both(target, head, prompt, stopping_criteria=criteria)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.sequences.shape[1] == length


def test_without_an_end_token_finished_rows_go_on_as_in_plain_generate(
    head: DraftHead, target: PreTrainedModel
) -> None:
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    criteria = StoppingCriteriaList([StopAfter((9, 14, 20))])
    plain, tree = both(target, head, ids, stopping_criteria=criteria, eos_token_id=-1, **SAMPLING)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_a_stateful_processor_is_called_once_per_committed_token(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    outputs, calls = [], []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(WIDE)}):
        processor = Restive(3)
        outputs.append(
            target.generate(prompt, logits_processor=LogitsProcessorList([processor]), max_new_tokens=20, **extra)
        )
        calls.append(processor.calls)
    assert outputs[0].tolist() == outputs[1].tolist()
    assert calls[0] == calls[1] == outputs[0].shape[1] - prompt.shape[1]


@pytest.mark.parametrize("stop", ["d", "fg", "kk"])
def test_stop_strings_stop_at_the_same_token(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, stop: str
) -> None:
    for seed in range(4):
        plain, tree = both(
            target, head, prompt, seed=seed, stop_strings=[stop], tokenizer=letter_tokenizer(), **SAMPLING
        )
        assert tree.sequences.tolist() == plain.sequences.tolist()


def test_learned_positions_may_run_out_in_the_middle_of_a_tree() -> None:
    architecture = Architecture("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 20})
    target = attach(architecture.build("sdpa"))
    plain, tree = both(target, DraftHead.from_target(target), torch.arange(3, 10)[None], max_new_tokens=13)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_longrope_is_exact_up_to_its_boundary_and_behind_it_and_refused_across() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    target = attach(Architecture("phi3", {"rope_parameters": rope, **sizes}).build("sdpa"))
    head = DraftHead.from_target(target)
    for prompt_length, room in ((7, 10), (20, 12)):
        plain, tree = both(target, head, torch.arange(prompt_length)[None] % 16 + 1, max_new_tokens=room)
        assert tree.sequences.tolist() == plain.sequences.tolist()
        assert tree.speculation.tau > 1
    with pytest.raises(ValueError, match="past 16.*max_length"):
        target.generate(torch.arange(3, 10)[None], assistant_model=head, max_new_tokens=11)


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_what_changes_no_token_may_be_passed_on(options: dict[str, Any], prompt: torch.Tensor) -> None:
    """The labels of a trainer, and a mixture of experts that is asked for its router's logits."""
    target = attach(next(each for each in ARCHITECTURES if str(each) == "mixtral").build("eager"))
    extra = {"labels": torch.zeros_like(prompt), "output_router_logits": True}
    plain, tree = both(target, DraftHead.from_target(target), prompt, **options, **extra)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_a_trainer_predicts_with_an_attached_model(
    target: PreTrainedModel, prompt: torch.Tensor, tmp_path: Any
) -> None:
    """It passes the labels on."""
    ids = prompt[0].tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for _ in range(3)]
    settings: Any = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "generation_max_length": 20}
    found = []
    for policy in ("plain", "auto"):
        model = copy.deepcopy(target)
        model.generation_config.policy, model.generation_config.pad_token_id = policy, 0
        arguments = Seq2SeqTrainingArguments(predict_with_generate=True, per_device_eval_batch_size=2, **settings)
        found.append(Seq2SeqTrainer(model=model, args=arguments, eval_dataset=rows).predict(rows).predictions.tolist())
    assert found[0] == found[1]
