"""`attach` and `detach`, copies, adapters and pipelines: a model stays what it was."""

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.lossless.answering import both
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, detach
from transformers_resps.generation.mixin import ReSpSGenerationMixin


def test_attach_returns_the_same_object_and_detach_restores_it() -> None:
    model = Architecture("llama").build("sdpa")
    cls, weights = type(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert attach(model) is model and attach(model) is model
    assert isinstance(model, cls)
    assert detach(model) is model and type(model) is cls
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_detach_takes_away_all_that_attach_and_generate_left(prompt: torch.Tensor) -> None:
    model: Any = Architecture("llama").build("sdpa")
    before = set(vars(model))
    attach(model, policy="auto").generate(prompt, max_new_tokens=4)
    assert vars(model).keys() - before
    assert set(vars(detach(model))) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, detach])
def test_a_subclass_of_somebodys_own_stays_what_it_is(duplicate: Any) -> None:
    model: Any = Architecture("llama").build("sdpa")

    class Own(ReSpSGenerationMixin, type(model)):  # type: ignore[misc]  # of whichever class that is
        pass

    model.__class__ = Own
    assert type(duplicate(attach(model))) is Own


def test_a_model_class_with_a_generate_of_its_own_gets_what_the_caller_gave_and_no_more(
    target: PreTrainedModel, prompt: torch.Tensor
) -> None:
    target = detach(copy.deepcopy(target))
    base: Any = type(target)

    class Own(base):  # type: ignore[misc]  # of whichever class that is
        def generate(self, input_ids: Any = None, **options: Any) -> Any:
            return super().generate(input_ids, **options)

    expected = target.generate(prompt, max_new_tokens=8, do_sample=False)
    target.__class__ = Own
    for options in ({}, {"policy": "auto"}):
        found = attach(target).generate(prompt, max_new_tokens=8, do_sample=False, **options)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("given", [{"policy": "auto"}, {"policy": FixedPolicy(TreeShape(4, 2, 2))}, {}], ids=str)
def test_ids_in_few_bits_come_back_as_plain_decoding_returns_them(
    given: dict[str, Any], target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    expected = detach(copy.deepcopy(target)).generate(prompt.int(), max_new_tokens=8, do_sample=False)
    found = target.generate(prompt.int(), max_new_tokens=8, do_sample=False, assistant_model=head, **given)
    assert found.dtype == expected.dtype == torch.int64 and torch.equal(found, expected)


def test_a_text_may_be_endless_until_an_end_token(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    plain = target.generate(prompt, max_new_tokens=9, do_sample=False)
    end = {"eos_token_id": int(plain[0, -1]), "max_length": math.inf, "do_sample": False}
    expected = target.generate(prompt, **end)
    assert torch.equal(target.generate(prompt, assistant_model=head, **end), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_speculates_too(
    duplicate: Any, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    plain, tree = both(duplicate(target), head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_saving_an_attached_model_names_its_own_architecture(target: PreTrainedModel, tmp_path: Any) -> None:
    target.save_pretrained(tmp_path)
    assert type(target).from_pretrained(tmp_path).config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("attach_first", [False, True])
def test_a_target_with_a_lora_adapter_speculates(prompt: torch.Tensor, attach_first: bool) -> None:
    model = Architecture("llama").build("sdpa")
    head = DraftHead.from_target(model)
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = get_peft_model(attach(model), lora) if attach_first else attach(get_peft_model(model, lora))
    plain, tree = both(wrapped.eval(), head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.speculation.tau > 1


def test_a_head_with_an_adapter_drafts(target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor) -> None:
    wrapped = get_peft_model(copy.deepcopy(head), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    plain, tree = both(target, wrapped, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_the_pipeline_takes_a_head(target: PreTrainedModel, head: DraftHead) -> None:
    from transformers import pipeline

    tokenizer = letter_tokenizer()
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)("bdfh", **options)
    tree = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)("bdfh", **options)
    assert tree == plain


def test_a_model_with_a_custom_generate_folder_is_refused_until_its_own_generate_is_gone(
    prompt: torch.Tensor, tmp_path: Any
) -> None:
    """Loading puts that function into the object, in front of its class and of whatever `attach` would put there."""
    Architecture("llama").build("sdpa").save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, *args, **kwargs):\n    return 'custom'\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"`generate` of its own .* `custom_generate` .* Call `del model.generate`"):
        attach(model, policy="auto")
    assert model.generate(input_ids=prompt) == "custom", "the refusal changed nothing"
    del model.generate
    found = attach(model, policy="auto").generate(prompt, max_new_tokens=4, return_dict_in_generate=True)
    assert found.speculation is not None


def test_a_wrapper_around_the_generate_of_an_attached_model_stays_and_defaults_may_change(
    prompt: torch.Tensor,
) -> None:
    model: Any = attach(Architecture("llama").build("sdpa"))
    model.generate = functools.partial(model.generate, max_new_tokens=3, return_dict_in_generate=True)
    assert attach(model, policy="auto").generate(prompt).speculation is not None


def test_a_compiled_model_is_refused_with_the_order_that_works(prompt: torch.Tensor) -> None:
    model = Architecture("llama").build("sdpa")
    with pytest.raises(ValueError, match="of `torch.compile`.* Call `attach` on the model first"):
        attach(torch.compile(model))
    found = torch.compile(attach(model)).generate(
        prompt, policy="auto", max_new_tokens=4, return_dict_in_generate=True
    )
    assert found.speculation is not None
