"""What Transformers itself can decode, it decodes on an attached model exactly as on the model before."""

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration, set_seed

from tests.targets import VOCABULARY, Architecture
from transformers_resps import attach, detach


PROMPT = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A model, the same attached, and an assistant."""
    stock = Architecture("llama", {"eos_token_id": 2}).build("sdpa").float()
    return stock, attach(copy.deepcopy(stock)), Architecture("llama", {"eos_token_id": 2}).build("sdpa", 3).float()


def picks_the_second(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A decoding loop of the user's own, as `custom_generate` takes it."""
    for _ in range(5):
        second = model(input_ids=input_ids).logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, second], dim=-1)
    return input_ids


STOCK: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": "assistant"},
    "assistant, sampled": {"assistant_model": "assistant", "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "custom loop": {"custom_generate": picks_the_second},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "outputs": {"output_hidden_states": True, "output_attentions": False, "return_dict_in_generate": True},
    "cache passed": {"cache": DynamicCache},
}


@pytest.mark.parametrize("path", STOCK)
def test_a_stock_path_is_untouched(
    path: str, models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]
) -> None:
    stock, attached, assistant = models
    if path == "cache passed" and "cache" not in dir(
        stock.generate(PROMPT, max_new_tokens=1, return_dict_in_generate=True)
    ):
        pytest.skip("this release calls it past_key_values")
    found = []
    for model in (stock, attached):
        options = {name: assistant if value == "assistant" else value for name, value in STOCK[path].items()}
        options = {name: value() if isinstance(value, type) else value for name, value in options.items()}
        set_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(PROMPT, max_new_tokens=10, **options)
        found.append(out if torch.is_tensor(out) else out.sequences)
    assert found[0].tolist() == found[1].tolist()


def test_the_attached_model_may_be_an_assistant_itself(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel],
) -> None:
    stock, attached, assistant = models
    expected = stock.generate(PROMPT, max_new_tokens=10)
    for draft in (attach(copy.deepcopy(assistant)), attached):
        assert attached.generate(PROMPT, max_new_tokens=10, assistant_model=draft).tolist() == expected.tolist()


def test_an_encoder_decoder_keeps_its_assistant() -> None:
    """Stock `generate` hands the encoder's input only to a decoding method that names it."""

    def build(seed: int) -> PreTrainedModel:
        set_seed(seed)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        special = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **special)).eval()

    stock, assistant = build(0), build(1)
    expected = stock.generate(PROMPT, max_new_tokens=8, assistant_model=assistant)
    assert attach(stock).generate(PROMPT, max_new_tokens=8, assistant_model=assistant).tolist() == expected.tolist()


def test_detached_it_is_the_stock_model_again(
    models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel],
) -> None:
    stock, attached, _ = models
    again = detach(copy.deepcopy(attached))
    assert type(again) is type(stock)
    assert again.generate(PROMPT, max_new_tokens=10).tolist() == stock.generate(PROMPT, max_new_tokens=10).tolist()
    assert PROMPT.max() < VOCABULARY


TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "a text": ({"inputs": "Hello"}, "the text 'Hello' as a prompt.*Tokenise it"),
    "by name": ({"input_ids": "Hello"}, "the text 'Hello' as a prompt.*Tokenise it"),
    "several": ({"inputs": ["Hello", "you"]}, "the text 'Hello' as a prompt.*Tokenise it"),
    "all of it": ({"inputs": BatchEncoding({"input_ids": PROMPT})}, r"a BatchEncoding.*generate\(\*\*inputs\)"),
}


@pytest.mark.parametrize("policy", [None, "auto"])
@pytest.mark.parametrize("case", TEXTS)
def test_what_is_not_tokenised_is_told_how_to_be(
    case: str, policy: str | None, models: tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]
) -> None:
    given, message = TEXTS[case]
    with pytest.raises(ValueError, match=message):
        models[1].generate(**given, policy=policy)
