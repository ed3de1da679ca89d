"""Fresh heads: what `from_target` takes, and what it refuses before a head exists that fails in `generate`."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedModel, T5Config

from tests.conftest import build_target
from tests.multimodal_targets import TARGETS, VOCABULARY, MultimodalTarget
from transformers_resps import attach
from transformers_resps.heads import BoundHead, DraftHead


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_target(num_hidden_layers=8)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"norm_before_fcc": True}, r"got \['norm_before_fcc'\], which it does not know.*Check the spelling"),
    ({"rope_theta": 1e6}, r"got \['rope_theta'\]"),
    ({"hidden_size": None}, "`hidden_size=None`, but it must be a positive integer"),
    ({"draft_token_ids": [-1, 3]}, "go from -1 to 3, but the target's ids go from 0 to 63"),
    ({"draft_token_ids": [3, 64]}, "go from 3 to 64"),
    ({"draft_token_ids": [3, 3]}, "has 2 ids, 1 of them distinct"),
    ({"draft_token_ids": [3, 4], "draft_vocab_size": 3}, "has 2 ids, 2 of them distinct, but `draft_vocab_size` is 3"),
    ({"draft_token_ids": []}, r"shape \[0\], but must be a list or tensor"),
    ({"draft_token_ids": [1.0, 2.0]}, "torch.float32"),
    ({"draft_token_ids": torch.tensor([1.0, 2.0])}, "torch.float32"),
    ({"draft_token_ids": torch.tensor([True, False])}, "torch.bool"),
    ({"draft_token_ids": torch.tensor([[1, 2]])}, r"shape \[1, 2\]"),
    ({"draft_vocab_size": 0}, "Pass a number from 1 to 64"),
    ({"draft_vocab_size": 65}, "the target has 64 tokens"),
    ({"draft_vocab_size": "8"}, "is '8'.*Pass a number from 1 to 64"),
    ({"feature_layers": [2, 2]}, "must be a list of distinct"),
    ({"feature_layers": [-1, 2]}, "at least 0"),
    ({"feature_layers": [1, 9]}, r"the feature layers \[1, 9\], but this target has the hidden states 0 to 8"),
    ({"feature_layers": []}, "must be a list of distinct integers"),
    ({"default_tree": [8, 3]}, r"`default_tree=\[8, 3\]`, but it must be a list of total_tokens"),
    ({"default_tree": [-8, 3, 2]}, "TreeShape got `total_tokens=-8`"),
    ({"hidden_size": 64}, "`hidden_size=64`, but what it borrows from the target is 32 wide.*`owns_embedding=True`"),
    ({"hidden_size": 64, "owns_embedding": True}, "`owns_output_head=True`"),
    ({"target_hidden_size": 64}, "`target_hidden_size=64`, but the target's is 32"),
    ({"vocab_size": 80}, "`vocab_size=80`, but the target's is 64"),
    ({"draft_vocab_size": 8, "owns_output_head": False}, "needs an output head of its own"),
    ({"num_attention_heads": 5}, "`num_attention_heads=5` and `num_key_value_heads=2`"),
    ({"num_key_value_heads": 3}, "Make the first a multiple of the second"),
    ({"num_hidden_layers": 0}, "positive integer"),
    ({"head_dim": 7}, "RoPE rotates pairs"),
    ({"hidden_act": "grin"}, "the activation 'grin'"),
    ({"owns_embedding": "no"}, "must be True or False"),
    ({"rope_parameters": {"rope_type": "grin"}}, "RoPE of the kind 'grin'; known are"),
    ({"fc_norm": True, "norm_before_fc": True}, "both `norm_before_fc` and `fc_norm`.*Keep the one"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_a_head_that_could_not_draft_is_not_made(
    fields: dict[str, Any], message: str, target: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DraftHead.from_target(target, **fields)


@pytest.mark.parametrize("maker", [T5Config, BartConfig])
def test_an_encoder_decoder_gets_no_head(maker: Any) -> None:
    model = AutoModelForSeq2SeqLM.from_config(maker(vocab_size=64, d_model=32, num_layers=1))
    with pytest.raises(ValueError, match="is an encoder-decoder, but a head needs a decoder-only target"):
        DraftHead.from_target(model)


@pytest.mark.parametrize("odd", ["meta-llama/Toy", None, torch.nn.Linear(2, 2)], ids=["str", "none", "module"])
def test_a_target_is_a_loaded_model(odd: Any, target: PreTrainedModel) -> None:
    for use in (DraftHead.from_target, DraftHead.from_target(target).check_target):
        with pytest.raises(ValueError, match=f"`target` is a {type(odd).__name__}, but must be the loaded model"):
            use(odd)


def test_stock_generate_says_that_the_model_must_be_attached() -> None:
    alone = build_target()
    head = DraftHead.from_target(alone, 16)
    assert not hasattr(head, "generation_config") and not hasattr(head, "no_such_thing")
    with pytest.raises(AttributeError, match=r"no `generation_config`.*Call `transformers_resps.attach\(model\)`"):
        alone.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, assistant_model=head)
    with pytest.raises(AttributeError, match="'DraftHead' object has no attribute 'no_such_thing'"):
        head.no_such_thing  # noqa: B018


@pytest.mark.parametrize("ids", [[9, 3, 30], (30, 9, 3), torch.tensor([3, 9, 30]), torch.tensor([9, 30, 3]).int()])
def test_draft_ids_come_as_a_list_or_a_tensor_in_any_order(ids: Any, target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target, draft_token_ids=ids)
    assert head.draft_token_ids.tolist() == [3, 9, 30] and head.config.draft_vocab_size == 3
    assert torch.equal(head.lm_head.weight, target.get_output_embeddings().weight[[3, 9, 30]])


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 64, "owns_embedding": True, "draft_vocab_size": 16},
        {"hidden_size": 64, "owns_embedding": True, "owns_output_head": True},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": None},
        {"feature_layers": [8, 0], "default_tree": (4, 2, 2, 3), "num_hidden_layers": 2},
        {"norm_before_fc": True, "qk_norm": True, "attention_bias": True},
    ],
    ids=str,
)
def test_what_is_not_refused_decodes(fields: dict[str, Any], target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target, **fields)
    attach(target)
    prompt = torch.tensor([[1, 5, 9]])
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=head))


@pytest.mark.parametrize("fields", [{}, {"owns_output_head": True}, {"draft_token_ids": [3, 40, 5]}], ids=str)
def test_a_head_starts_with_the_targets_own_rows_and_final_norm(fields: dict[str, Any], target: Any) -> None:
    with torch.no_grad():
        target.model.norm.weight.uniform_(0.5, 2.0)
    head = DraftHead.from_target(target, **fields)
    assert torch.equal(head.norm.weight, target.model.norm.weight)
    rows = (
        target.lm_head.weight[sorted(fields["draft_token_ids"])]
        if "draft_token_ids" in fields
        else target.lm_head.weight
    )
    assert not head.config.owns_output_head or torch.equal(head.lm_head.weight, rows)


@pytest.mark.parametrize("kind", TARGETS, ids=str)
def test_a_head_of_a_multimodal_target_has_the_sizes_and_rows_of_its_text_decoder(kind: MultimodalTarget) -> None:
    """Some of their text configs name no end tokens, and Gemma 4's has another `head_dim` in every second layer."""
    target = kind.build()
    head = DraftHead.from_target(target, 16)
    config, text, decoder = head.config, target.config.get_text_config(), target.get_decoder()
    assert (config.hidden_size, config.vocab_size, config.head_dim) == (32, VOCABULARY, 8)
    assert config.target["model_type"] == text.model_type
    assert config.eos_token_id == getattr(text, "eos_token_id", None)
    assert torch.equal(head.lm_head.weight, target.lm_head.weight[:16])
    assert config.features_width == 32 * len(config.feature_layers)
    assert BoundHead(head, target).embed_tokens is decoder.get_input_embeddings()
