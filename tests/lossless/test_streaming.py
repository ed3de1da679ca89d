"""What streams, to whoever reads, and what a reader sees of a call that fails."""

import threading

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, TextIteratorStreamer

from tests.lossless.answering import WIDE, Heard, Raises
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy


def test_the_streamer_gets_what_plain_generate_streams(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    plain, tree = Heard(), Heard()
    target.generate(prompt, streamer=plain, max_new_tokens=20)
    target.generate(prompt, streamer=tree, max_new_tokens=20, assistant_model=head, policy=FixedPolicy(WIDE))
    assert tree.values == plain.values
    assert tree.ended == plain.ended == 1


def test_a_text_iterator_streamer_in_a_thread_gets_the_whole_text(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    tokenizer = letter_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    options = {"max_new_tokens": 20, "assistant_model": head, "policy": FixedPolicy(WIDE), "streamer": streamer}
    thread = threading.Thread(target=target.generate, args=(prompt,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = target.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :]
    assert text == tokenizer.decode(expected)


def test_the_stream_of_a_call_that_is_refused_does_not_look_like_an_answer(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    """Only who called knows of the error. A server puts it into the queue that its reader waits for."""
    streamer = Heard()
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(prompt, streamer=streamer, assistant_model=head, max_new_tokens=5, num_beams=2)
    assert not streamer.ended


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopIteration])
def test_a_stream_that_fails_ends_as_with_plain_generate(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, error: type[BaseException]
) -> None:
    plain, tree = Heard(), Heard()
    for streamer, extra in ((plain, {}), (tree, {"assistant_model": head, "policy": FixedPolicy(WIDE)})):
        processors = LogitsProcessorList([Raises(4, error)])
        with pytest.raises(error):
            target.generate(prompt, streamer=streamer, logits_processor=processors, max_new_tokens=20, **extra)
    assert tree.values == plain.values and len(tree.values) == 4
    assert tree.ended == plain.ended == 0
