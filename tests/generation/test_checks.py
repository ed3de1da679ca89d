"""Everything a tree cannot do is refused by name, before any work: one row per refusal."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from tests.multimodal_targets import IMAGE, TARGETS, MultimodalTarget
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    return DraftHead.from_target(target)


PROMPT = torch.tensor([[3, 4, 5]])


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, r"num_beams=3.*Set `num_beams=1`"),
    "beams in a config": ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2"),
    "beam groups": ({"num_beam_groups": 2}, "num_beam_groups"),
    "constraints": ({"constraints": [object()]}, "constraints"),
    "forced words": ({"force_words_ids": [[3]]}, "force_words_ids"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    "dola": ({"dola_layers": "low"}, "dola_layers"),
    "token healing": ({"token_healing": True}, "token_healing"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "a cache that is filled and never heeded": ({"use_cache": None}, "use_cache=None.*Set `use_cache=True`"),
    "the same by a number": ({"use_cache": 0}, "use_cache=0"),
    "a legacy cache": ({"cache": lambda: ()}, "got a `tuple`.*Pass `DynamicCache"),
    "chunks of less than nothing": ({"prefill_chunk_size": -1}, "prefill_chunk_size=-1.*Leave out"),
    "quantized cache": ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    "paged cache": ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    "a static cache of another model": (
        {"cache": lambda: StaticCache(config=LlamaConfig(), max_cache_len=9)},
        r"a `StaticCache` .*'StaticLayer', 9.* Pass `StaticCache\(config=model.config, max_cache_len=9\)`",
    ),
    "a static cache that is too short": (
        {CACHE_KEYWORD: lambda: StaticCache(config=LlamaConfig(num_hidden_layers=4), max_cache_len=5)},
        "holds 5 positions, but the text may come to need 6. Pass a longer one",
    ),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "Get them from a plain call"),
    "synced gpus": ({"synced_gpus": True}, "synced_gpus"),
    "assistant tokenizer": ({"assistant_tokenizer": object()}, "assistant_tokenizer"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "a number of drafted tokens": ({"num_assistant_tokens": 5}, r"num_assistant_tokens=5.*TreeShape\(n \+ 1, n, 1\)"),
    "a threshold of drafts": ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold=0.4.*policy"),
    "early exit": ({"assistant_early_exit": 1}, "assistant_early_exit"),
    "mtp": ({"use_mtp": True}, "use_mtp"),
    "speculation type": ({"speculation_type": "dflash"}, "speculation_type"),
    "ensemble weight": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "custom generate": ({"custom_generate": lambda *a, **k: None}, "custom_generate"),
    "positions of three dimensions": ({"position_ids": torch.zeros(3, 1, 3, dtype=torch.long)}, "3 dimensions"),
    "embeddings in chunks": (
        {"inputs_embeds": torch.zeros(1, 3, 32), "prefill_chunk_size": 2},
        "`inputs_embeds` with prefill_chunk_size=2.*Leave out the chunk size",
    ),
    "embeddings of other tokens": ({"inputs_embeds": torch.zeros(1, 5, 32)}, "of 3 tokens with .* of 5 positions"),
    "other inputs of the forward": ({"is_causal": False}, "is_causal"),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_setting_is_refused_by_name_and_the_next_call_is_as_ever(
    row: str, target: PreTrainedModel, head: DraftHead
) -> None:
    options, message = ROWS[row]
    made = {name: value() if name in ("cache", CACHE_KEYWORD) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, assistant_model=head, max_new_tokens=4, **made)
    plain = target.generate(PROMPT, max_new_tokens=4)
    assert target.generate(PROMPT, max_new_tokens=4, assistant_model=head).tolist() == plain.tolist()


MISFITS: dict[str, tuple[torch.Tensor, dict[str, Any], str]] = {
    "no token": (PROMPT[:, :0], {}, r"a prompt of the shape \[1, 0\].*`bos_token_id`"),
    "no row": (PROMPT[:0], {}, r"a prompt of the shape \[0, 3\]"),
    "a longer mask": (PROMPT, {"attention_mask": torch.ones(1, 4).long()}, "a text of 3 tokens and a mask of 4"),
    "a shorter mask": (PROMPT, {"attention_mask": torch.ones(1, 2).long()}, "a text of 3 tokens and a mask of 2"),
    "a mask of another batch": (PROMPT, {"attention_mask": torch.ones(2, 3).long()}, r"\[2, 3\] for 1 rows"),
    "fewer positions": (PROMPT, {"position_ids": torch.arange(2)[None]}, "a text of 3 tokens and a mask of 2"),
}


@pytest.mark.parametrize("row", MISFITS)
def test_a_prompt_and_a_mask_that_do_not_belong_together_are_refused(
    row: str, target: PreTrainedModel, head: DraftHead
) -> None:
    """Of a mask too short a part of the prompt was read, and a text came out."""
    prompt, options, message = MISFITS[row]
    with pytest.raises(ValueError, match=message):
        target.generate(prompt, assistant_model=head, max_new_tokens=4, **options)


def test_a_policy_without_a_head_says_what_is_missing(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="shapes the trees of a draft head, and the call has none.*policy='auto'"):
        target.generate(PROMPT, policy=FixedPolicy(TreeShape(8, 3, 2)))


def test_the_class_of_an_assistant_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="or a loaded model or head, got .*DraftHead.from_pretrained"):
        target.generate(torch.tensor([[3, 4]]), assistant_model=DraftHead)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ("auto", "got 'auto'. Pass it as `policy`"),
        (FixedPolicy(TreeShape(8, 3, 2)), r"got FixedPolicy\(.*Pass it as `policy`"),
        (TreeShape(8, 3, 2), r"Pass a head, and `policy=FixedPolicy\(TreeShape\(total_tokens=8,"),
        ({}, r"got \{\}. Pass `DraftHead"),
        (dict.fromkeys(range(99)), "got a dict. Pass `DraftHead"),
        (AssistedCandidateGenerator, r"Pass an object, `AssistedCandidateGenerator\(...\)`, not the class"),
    ],
    ids=["a word", "a policy", "a shape", "a dict", "a long repr", "the class of a generator"],
)
def test_what_is_no_assistant_says_where_it_belongs(given: Any, way_out: str, target: PreTrainedModel) -> None:
    for call in (
        lambda: target.generate(PROMPT, assistant_model=given),
        lambda: attach(target, assistant_model=given),
    ):
        with pytest.raises(ValueError, match=f"`assistant_model` must be a folder.*{way_out}"):
            call()


def test_a_shape_or_a_head_as_policy_says_where_it_belongs(target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match=r"Pass `FixedPolicy\(TreeShape\(total_tokens=8, depth=3, top_k=2, lookup=0"):
        target.generate(PROMPT, assistant_model=head, policy=TreeShape(8, 3, 2))
    with pytest.raises(ValueError, match="got a DraftHead. Pass it as `assistant_model`."):
        target.generate(PROMPT, policy=head)


@pytest.mark.parametrize("given", [8, (8, 3, 3)], ids=str)
def test_numbers_as_policy_are_told_the_fixed_tree(given: Any, target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"pass `FixedPolicy\(TreeShape\(8, 3, 3\)\)`"):
        target.generate(PROMPT, policy=given)


def test_a_model_that_was_not_attached_does_not_know_a_policy(head: DraftHead) -> None:
    """Stock's words; docs/get-started.md holds them, so that who searches for them finds `attach`."""
    stock = Architecture("llama").build("sdpa")
    with pytest.raises(ValueError) as refused:
        stock.generate(PROMPT, assistant_model=head, policy="auto")
    words = "The following `model_kwargs` are not used by the model: ['policy']"
    assert words in str(refused.value)
    page = (Path(__file__).parents[2] / "docs" / "get-started.md").read_text(encoding="utf-8")
    assert words in " ".join(page.split())


def test_a_folder_that_is_none_is_named(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="path/to/head is neither a folder nor a Hub id"):
        target.generate(torch.tensor([[3, 4]]), assistant_model="path/to/head")


@pytest.mark.parametrize("given", [0, "no", torch.tensor(False)], ids=str)
def test_lockstep_is_true_false_or_none(given: Any, target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match="`lockstep` must be True, False or None, got"):
        target.generate(torch.tensor([[3, 4]]), assistant_model=head, lockstep=given)


def test_a_policy_with_what_cannot_draft_is_refused(target: PreTrainedModel) -> None:
    policy = FixedPolicy(TreeShape(8, 3, 2))
    with pytest.raises(ValueError, match="is the target itself"):
        target.generate(PROMPT, policy=policy, assistant_model=target)
    with pytest.raises(ValueError, match="shapes the trees of a draft head or of a causal model"):
        target.generate(PROMPT, policy=policy, assistant_model=torch.nn.Linear(2, 2))


class LooksLikeAPolicy:
    """Has the methods, and none of the attributes."""

    choose = grow = size = observe = lambda *arguments: None


def test_an_object_that_is_no_policy_is_refused(target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match="object of a subclass of `Policy`, got <object.*write `choose`"):
        target.generate(PROMPT, assistant_model=head, policy=object())
    with pytest.raises(ValueError, match="Subclass `transformers_resps.Policy`"):
        target.generate(PROMPT, assistant_model=head, policy=LooksLikeAPolicy())
    with pytest.raises(ValueError, match="pass an object, not the class"):
        target.generate(PROMPT, assistant_model=head, policy=FixedPolicy)
    with pytest.raises(ValueError, match=r"needs a `TreeShape`, got \(8, 3, 2\). Pass"):
        FixedPolicy((8, 3, 2))
    assert not isinstance(object(), Policy)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 23}, "vocab_size 19 .this target: 23"),
        ({"hidden_size": 64, "head_dim": 16}, "hidden_size 32 .this target: 64"),
        ({"num_hidden_layers": 6}, "num_hidden_layers 4 .this target: 6"),
    ],
)
def test_the_head_of_another_target_names_both(head: DraftHead, other: dict[str, Any], message: str) -> None:
    stranger = attach(Architecture("llama", other).build("sdpa"))
    stranger.config.name_or_path = "someone/stranger"
    with pytest.raises(ValueError, match=f"was made for another target, not for someone/stranger.*{message}"):
        stranger.generate(PROMPT, assistant_model=head)


def test_the_head_of_another_architecture_is_refused(head: DraftHead) -> None:
    stranger = attach(Architecture("qwen2").build("sdpa"))
    with pytest.raises(ValueError, match="model_type llama .this target: qwen2"):
        stranger.generate(PROMPT, assistant_model=head)


def test_ranks_that_must_step_together_are_refused(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock `generate` sets `synced_gpus` by itself under ZeRO-3 and FSDP."""
    decode = type(target)._sample
    monkeypatch.setattr(
        type(target), "_sample", lambda self, *args, **kwargs: decode(self, *args, **{**kwargs, "synced_gpus": True})
    )
    with pytest.raises(ValueError, match="several ranks"):
        target.generate(PROMPT, policy="auto", max_new_tokens=2)


def test_a_head_on_another_device_says_where_it_is(target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target).to("meta")
    with pytest.raises(ValueError, match="The head is on meta, but .* on cpu"):
        target.generate(PROMPT, assistant_model=head, max_new_tokens=2)


def test_only_models_that_generate_can_be_attached() -> None:
    with pytest.raises(ValueError, match="only models with `generate` can be attached"):
        attach(torch.nn.Linear(2, 2))


def test_an_unknown_architecture_that_mixes_siblings_fails_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    target = attach(Architecture("llama").build("sdpa"))
    head = DraftHead.from_target(target)
    target.config.model_type = head.config.target["model_type"] = "newcomer"
    monkeypatch.setattr(type(target.model.rotary_emb), "forward", _positions_by_slot)
    with pytest.raises(ValueError, match="so trees would change its output"):
        target.generate(PROMPT, assistant_model=head)


def test_an_architecture_whose_forward_fails_on_a_tree_is_refused_in_our_words() -> None:
    target = attach(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=19, n_embd=16, n_layer=1, n_head=2)).eval())
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel .*fails on a draft tree.*Call `generate` without"):
        target.generate(PROMPT, policy="auto", max_new_tokens=2)


def _positions_by_slot(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """Ignores the positions it is told, as alibi models do."""
    positions = position_ids.min() + torch.arange(x.shape[1])[None]
    angles = positions[..., None].float() * self.inv_freq.float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_quantized_cache_object_is_refused(target: PreTrainedModel, head: DraftHead) -> None:
    pytest.importorskip("optimum.quanto")
    with pytest.raises(ValueError, match="Quant"):
        target.generate(PROMPT, assistant_model=head, cache=QuantizedCache("quanto", target.config))


TYPES = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize("types", [TYPES, torch.zeros_like(TYPES)], ids=["some", "zeros"])
def test_kinds_of_tokens_that_a_decoder_reads_in_every_step_are_refused(types: torch.Tensor) -> None:
    """GPT-2 adds the embedding of a token of that number, of 0 too; stock goes on with the last one."""
    target = attach(Architecture("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}).build("sdpa"))
    with pytest.raises(ValueError, match="the `token_type_ids` of GPT2LMHeadModel, which reads them with every token"):
        target.generate(PROMPT, policy="auto", max_new_tokens=4, token_type_ids=types)


def test_kinds_of_tokens_that_are_all_zero_are_no_input_where_zero_is_what_a_decoder_takes_without_them() -> None:
    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(**sizes, num_hidden_layers=2, is_decoder=True, initializer_range=0.5)
    target = attach(BertLMHeadModel(config).eval())
    plain = target.generate(PROMPT, max_new_tokens=8)
    found = target.generate(PROMPT, policy="auto", max_new_tokens=8, token_type_ids=torch.zeros_like(PROMPT))
    assert found.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="the `token_type_ids` of BertLMHeadModel"):
        target.generate(PROMPT, policy="auto", max_new_tokens=8, token_type_ids=TYPES)


# Inputs that no prompt can have are refused by name, before a tower reads an image or a sound.
def _target(name: str) -> MultimodalTarget:
    return next(kind for kind in TARGETS if str(kind) == name)


@pytest.fixture(scope="module", params=["gemma3", "qwen2_vl"])
def seeing(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """A target whose decoder and tower must not run, and a good prompt."""
    kind = _target(request.param)
    target = attach(kind.build(), policy="auto")
    target.generate(**kind.prompt("..I.."), max_new_tokens=2)  # the probe of trees runs once
    hooks = [module.register_forward_pre_hook(_not_reached) for module in target.modules()]
    yield target, kind.prompt("..I..")
    for hook in hooks:
        hook.remove()


def _not_reached(module: Any, arguments: Any) -> None:
    raise AssertionError("the target has begun to work")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": "ints"}, "`pixel_values` is a tensor of torch.int64, but .* reads floats"),
        (
            {"input_ids": "only placeholders", "pixel_values": None},
            "All tokens of the prompt, .* and the call has none",
        ),
        ({"cross_attention_mask": torch.ones(1, 1)}, "cross_attention_mask"),
    ],
    ids=["pixels of integers", "placeholders alone", "an unknown argument"],
)
def test_a_bad_input_is_refused_before_any_work(
    seeing: tuple[PreTrainedModel, dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    target, prompt = seeing
    ids = prompt["input_ids"]
    made = {"ints": prompt["pixel_values"].long(), "only placeholders": torch.full_like(ids, IMAGE)}
    changed = {name: made[value] if isinstance(value, str) else value for name, value in changes.items()}
    if "pixel_values" in changed and changed["pixel_values"] is None:
        prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=message):
        target.generate(**prompt | changed, max_new_tokens=4)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "paddleocr_vl"])
def test_the_forward_of_stock_refuses_a_placeholder_too_many(name: str) -> None:
    kind = _target(name)
    target, prompt = attach(kind.build(), policy="auto"), kind.prompt("..I..")
    prompt["input_ids"] = torch.cat([torch.tensor([[IMAGE]]), prompt["input_ids"][:, 1:]], dim=1)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        target.generate(**prompt, max_new_tokens=4)


def test_an_image_for_a_model_of_text_is_refused() -> None:
    target = attach(Architecture("llama").build("sdpa"), policy="auto")
    with pytest.raises(ValueError, match="pixel_values"):
        target.generate(torch.tensor([[3, 4, 5]]), pixel_values=torch.zeros(1, 3, 8, 8), max_new_tokens=4)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 8), (1, 0, 32)], ids=str)
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    target = attach(Architecture("llama").build("sdpa"), policy="auto")
    with pytest.raises(ValueError, match=r"`inputs_embeds` has the shape .* reads `\[b, s, 32\]`"):
        target.generate(inputs_embeds=torch.zeros(shape), max_new_tokens=4)


def test_a_placeholder_that_stands_in_a_text_without_images_is_a_token_like_any_other() -> None:
    kind = _target("gemma3")
    target = attach(kind.build())
    prompt = torch.tensor([[3, IMAGE, 4, 5, 3, IMAGE]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert target.generate(prompt, max_new_tokens=12, do_sample=False, policy="auto").tolist() == plain.tolist()


# Models that would write another text with a tree: by their architecture, or because their layers draw numbers.
FOUR = torch.tensor([[5, 7, 11, 3]])
ADAPTER = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)


@pytest.fixture
def fresh() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


def generate(target: Any, head: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    policy = None if head is None else FixedPolicy(TreeShape(9, 3, 2))
    return target.generate(
        input_ids=FOUR, assistant_model=head, policy=policy, do_sample=True, max_new_tokens=8, **settings
    )[0].tolist()


@pytest.mark.parametrize(
    ("model_type", "config", "layer"),
    [("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4}, "drop"), ("llama", {"attention_dropout": 0.1}, "self_attn")],
)
def test_a_target_with_dropout_in_training_is_refused(model_type: str, config: dict[str, Any], layer: str) -> None:
    target = attach(Architecture(model_type, config).build("sdpa"))
    head = DraftHead.from_target(target)
    plain = generate(target, None)
    assert generate(target, head) == plain
    target.train()
    with pytest.raises(ValueError, match=f"training mode, where its layer `.*{layer}` draws.*Call `.eval"):
        generate(target, head)


def test_a_target_without_dropout_may_be_in_training(fresh: PreTrainedModel) -> None:
    head = DraftHead.from_target(fresh).train()
    assert generate(fresh.train(), head) == generate(fresh, None)


def test_an_adapter_with_dropout_is_refused_in_training_alone(fresh: PreTrainedModel) -> None:
    head, adapted = DraftHead.from_target(fresh), get_peft_model(fresh, ADAPTER)
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode.*lora_dropout"):
        generate(adapted, head)
    adapted.eval()
    assert generate(adapted, head) == generate(adapted, None)


def test_a_head_whose_adapter_would_draw_the_texts_random_numbers_is_refused(fresh: PreTrainedModel) -> None:
    """Its dropout takes them from the generator that tokens are sampled from."""
    head = get_peft_model(DraftHead.from_target(fresh, VOCABULARY), ADAPTER)
    with pytest.raises(ValueError, match="DraftHead is in training mode.*lora_dropout"):
        generate(fresh, head)
    assert generate(fresh, head.eval()) == generate(fresh, None)


@pytest.mark.parametrize("attention", ["paged|flash_attention_2", "flex_attention"])
def test_an_attention_without_tree_masks_is_refused(attention: str) -> None:
    target = attach(Architecture("llama").build("sdpa"))
    head = DraftHead.from_target(target)
    target.config._attn_implementation_internal = attention
    with pytest.raises(ValueError, match=rf"{re.escape(attention)}.*set_attn_implementation"):
        target.generate(FOUR, assistant_model=head)


STATEFUL = {
    "mamba": ({}, "Mamba-1"),
    "bloom": ({"n_layer": 4, "n_head": 4}, "alibi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 4}, "alibi"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
}


@pytest.mark.parametrize("model_type", STATEFUL)
def test_an_architecture_that_cannot_branch_is_refused(model_type: str) -> None:
    config, message = STATEFUL[model_type]
    target = attach(Architecture(model_type, config).build("eager"))
    text = target.config.get_text_config()
    head = DraftHead.from_target(
        Architecture("llama", {"num_hidden_layers": text.num_hidden_layers, "hidden_size": text.hidden_size}).build(
            "sdpa"
        )
    )
    head.config.target = None
    with pytest.raises(ValueError, match=message):
        target.generate(FOUR, assistant_model=head, max_new_tokens=4)


def test_windows_counted_in_cache_slots_are_refused() -> None:
    """GPT-Neo's local layers, which a short probe would not find out."""
    config = GPTNeoConfig(
        vocab_size=19, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ValueError, match="local layers in cache slots"):
        attach(GPTNeoForCausalLM(config)).generate(FOUR, policy="auto", max_new_tokens=2)
