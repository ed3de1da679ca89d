"""Conversations about images become tokens with a mask, and batches of what the target's forward takes."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests.image_processors import image_processor, image_prompt, parts, picture
from tests.multimodal_targets import IMAGE, VOCABULARY
from tests.tokenizers import turns
from transformers_resps.data import prepare_dataset
from transformers_resps.data.batches import PreparedTexts, StreamedBatches, collate


PROCESSORS = {name: image_processor(name) for name in ("gemma3", "qwen3_vl")}
SHOWN = {"gemma3": "aa<start><image><image><image><image><end>aa", "qwen3_vl": "<start>" + 6 * "<image>" + "<end>"}


def prepared(rows: list[dict[str, Any]], name: str = "gemma3", **how: Any) -> Any:
    processor = PROCESSORS[name]
    given = {"max_length": 60, "vocab_size": VOCABULARY, "processor": processor, **how}
    return prepare_dataset(Dataset.from_list(rows), "train_dataset", processor.tokenizer, **given)


def read(row: dict[str, Any], name: str) -> tuple[str, str]:
    """The whole text and what is learned from, in letters and marks."""
    marks = PROCESSORS[name].tokenizer.convert_ids_to_tokens(row["input_ids"])
    return "".join(marks), "".join(mark for mark, counts in zip(marks, row["loss_mask"], strict=True) if counts)


def talk(*contents: str) -> dict[str, Any]:
    """A conversation whose first question shows an image."""
    return {"messages": parts(turns(*contents), images=1)}


TEXT = "h{}decaifgcahdcaiec"


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(
    "row",
    [
        talk("de", "fg", "d", "e") | {"images": [picture()]},
        {"messages": turns("de", "fg", "d", "e"), "images": [picture()]},
        {"messages": turns("de", "fg", "d", "e"), "image": picture()},
    ],
    ids=["parts", "strings", "one image"],
)
def test_messages_that_show_an_image_by_hand(row: dict[str, Any], name: str) -> None:
    """Line breaks are the unknown token "a"."""
    (made,) = prepared([row], name)
    assert read(made, name) == (TEXT.format(SHOWN[name]), "fgcec")
    assert made["question"] == "de" and made["length"] == len(made["input_ids"])


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_prompt_is_what_the_processor_makes_of_it_and_only_the_completion_is_learned_from(name: str) -> None:
    place = {"gemma3": "<start>", "qwen3_vl": "<start><image><end>"}[name]
    rows = [
        {"prompt": talk("defgde")["messages"], "completion": parts(turns("", "fg")[1:]), "images": [picture()]},
        {"prompt": f"h{place}defgdec\ni", "completion": "fgc", "images": [picture()]},
    ]
    for row in rows:
        (made,) = prepared([row], name)
        inputs = image_prompt(PROCESSORS[name])
        begins = inputs["input_ids"].shape[1]
        assert made["input_ids"][:begins] == inputs["input_ids"][0].tolist()
        assert made["loss_mask"] == [False] * begins + [True] * 3
        batch = collate([PreparedTexts(prepared([row], name))[0]], PROCESSORS[name])
        shown = batch["image_inputs"]
        assert set(shown) == set(inputs) - {"input_ids", "attention_mask"}
        for key, value in shown.items():
            assert torch.equal(value[:, :begins] if key.endswith("token_type_ids") else value, inputs[key])


def types(batch: dict[str, Any]) -> Tensor:
    (found,) = (value for name, value in batch["image_inputs"].items() if name.endswith("token_type_ids"))
    return found


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_batch_mixes_rows_with_several_images_with_one_and_with_none(name: str) -> None:
    rows = [
        {"messages": parts(turns("de", "f"), images=2), "images": [picture(1), picture(2)]},
        {"messages": parts(turns("de", "fg")), "images": []},
        {"messages": talk("d", "fg")["messages"] + talk("e", "k")["messages"], "images": [picture(3), picture(4)]},
    ]
    texts = PreparedTexts(prepared(rows, name))
    batch = collate([texts[0], texts[1], texts[2]], PROCESSORS[name])
    assert torch.equal(types(batch) == 1, batch["input_ids"] == IMAGE)
    alone = [image_prompt(PROCESSORS[name], seed)["pixel_values"] for seed in (1, 2, 3, 4)]
    assert torch.equal(batch["image_inputs"]["pixel_values"], torch.cat(alone))
    assert "image_inputs" not in collate([texts[1]], PROCESSORS[name])
    assert [example.input_ids.tolist() for example in texts.examples()] == [
        texts[i]["input_ids"].tolist() for i in range(3)
    ]


def test_an_image_is_not_cut_and_rows_without_an_answer_before_it_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    later = {"messages": parts(turns("de", "fg")) + talk("e", "k")["messages"], "images": [picture()]}
    made = prepared([later, talk("de", "fg") | {"images": [picture()]}], max_length=12)
    assert len(made) == 1 and read(made[0], "gemma3") == ("hdecaifgc", "fgc")
    assert "1 of 2 rows" in caplog.text
    (shown,) = (PreparedTexts(made)[0],)
    assert "pictures" not in shown


def test_a_stream_with_images_is_prepared_as_it_is_read() -> None:
    rows = [talk("de", text) | {"images": [picture(index)]} for index, text in enumerate(("fg", "f", "kk"))]
    stream = Dataset.from_list([*rows, {"messages": parts(turns("de")), "images": []}]).to_iterable_dataset()
    processor = PROCESSORS["gemma3"]
    how = {"max_length": 60, "vocab_size": VOCABULARY, "processor": processor}
    made = prepare_dataset(stream, "train_dataset", processor.tokenizer, **how)
    (batch,) = StreamedBatches(made, 1000)
    assert len(batch) == 3
    assert collate(batch, processor)["image_inputs"]["pixel_values"].shape[0] == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "de", "images": [picture()]}, "the column `text`, but images are shown by `messages`"),
        (talk("de", "f") | {"images": []}, "has 0 images, but its messages have places for 1"),
        (talk("de", "f") | {"images": [picture()] * 2}, "has 2 images, but its messages have places for 1"),
        (
            {
                "messages": parts(turns("d")) + [talk("f")["messages"][0] | {"role": "assistant"}],
                "images": [picture()],
            },
            "an assistant's turn with an image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}], "images": [picture()]},
            "a part must be text or the place of an image",
        ),
    ],
    ids=["text", "too few", "too many", "assistant", "inline"],
)
def test_rows_whose_images_have_no_place_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared([row])


def test_images_need_a_processor() -> None:
    with pytest.raises(
        ValueError, match="has images, but the target reads none, or .* no processor.*`AutoProcessor.from_pretrained`"
    ):
        prepared([talk("de", "f") | {"images": [picture()]}], processor=None)
