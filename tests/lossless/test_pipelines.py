"""Pipelines of images and texts through attached models: what they answer without speculation, whole and streamed."""

from threading import Thread
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer, pipeline
from transformers.utils import is_torchvision_available

from tests.image_processors import image_processor, image_prompt, image_target, parts, picture
from tests.tokenizers import turns
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach, detach
from transformers_resps.telemetry import SpeculationReport


KINDS = ("gemma3", "qwen3_vl")
WIDE = FixedPolicy(TreeShape(40, 3, 24))
Pair = tuple[PreTrainedModel, ProcessorMixin]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return image_target(request.param), image_processor(request.param)


def conversation(question: str, seed: int = 0) -> list[dict[str, Any]]:
    """A user's question about a picture."""
    messages = parts(turns(question), images=1)
    messages[0]["content"][0]["image"] = picture(seed)
    return messages


_NEEDS_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="the pipeline needs torchvision")


@pytest.mark.parametrize("task", ["image-text-to-text", pytest.param("any-to-any", marks=_NEEDS_TORCHVISION)])
@pytest.mark.parametrize("drafter", ["head", "lookup"])
def test_a_pipeline_answers_what_it_answers_without_speculation(pair: Pair, task: str, drafter: str) -> None:
    target, processor = pair
    chats = [conversation("defgde"), conversation("gfedgfed", seed=1)]
    calls = [pipeline(task, model=target, processor=processor) for _ in range(2)]
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    plain = [calls[0](text=chat, **options) for chat in chats]
    torch.manual_seed(1)
    head = DraftHead.from_target(target) if drafter == "head" else None
    attach(target, assistant_model=head, policy=WIDE if drafter == "head" else "auto")
    assert [calls[1](text=chat, **options) for chat in chats] == plain
    assert plain[0][0]["generated_text"] != plain[1][0]["generated_text"]
    detach(target)


def test_an_answer_about_an_image_is_streamed_as_it_is_written(pair: Pair) -> None:
    target, processor = pair
    attach(target, policy="auto")
    prompt = image_prompt(processor)
    plain = target.generate(**prompt, policy="plain", max_new_tokens=20, do_sample=False)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    reports: list[SpeculationReport] = []

    def run() -> None:
        options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
        reports.append(target.generate(**prompt, streamer=streamer, **options).speculation)

    thread = Thread(target=run)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.tokenizer.decode(plain[0, prompt["input_ids"].shape[1] :])
    assert reports[0].emitted_total == 20
