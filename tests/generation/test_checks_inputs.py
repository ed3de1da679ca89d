"""Inputs that no prompt can have are refused by name, before a tower reads an image or a sound."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.multimodal_targets import IMAGE, TARGETS, MultimodalTarget
from tests.targets import Architecture
from transformers_resps import attach


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
    made = {
        "ints": prompt["pixel_values"].long(),
        "only placeholders": torch.full_like(ids, IMAGE),
    }
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
