"""`resps serve`, by what its clients see: answers, figures, refusals, and a server that lives."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("transformers", minversion="5.25", reason="the extra `serve` needs Transformers 5.25")

import openai
import uvicorn
from transformers import AutoModelForCausalLM

from tests.assistants.kinds import add_mtp_layer
from tests.conftest import build_target
from tests.targets import VOCABULARY
from tests.tokenizers import templated
from transformers_resps import DraftHead, attach
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.tools import serving
from transformers_resps.tools.cli import main
from transformers_resps.tools.loading import load_target
from transformers_resps.verifying.invariant.verifier import TextReader


ASKED: list[dict[str, Any]] = [{"role": "user", "content": "abdabdabd"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
TEXT, IMAGE = {"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
LENGTH = 64  # positions of the targets


@cache
def loaded(folder: Path, dtype: str) -> Any:
    """A target that no server has."""
    return attach(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


class Client:
    """A running server, and what is asked of it over the loopback."""

    def __init__(self, port: int, folder: Path, models: Any = None) -> None:
        self.port, self.folder, self.models = port, folder, models
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    @property
    def target(self) -> str:
        return str(self.folder / "target")

    def send(self, path: str, body: Any, method: str = "POST") -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json"})
        return connection

    def ask(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
        answer = self.send(
            path, {"model": self.target} | body if isinstance(body, dict) else body, "POST"
        ).getresponse()
        return answer.status, json.loads(answer.read())

    def text(self, body: dict[str, Any]) -> str:
        return str(self.ask(body)[1]["choices"][0]["message"]["content"])

    def stream(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
        answer = self.send(path, {"model": self.target, "stream": True} | body).getresponse()
        events = answer.read().decode().split("\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in events if event]

    def metrics(self) -> dict[str, float]:
        lines = self.send("/metrics", b"", "GET").getresponse().read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def plain(self, content: str = "abdabdabd", name: str = "target", dtype: str = "float32", **settings: Any) -> str:
        """What the target writes alone."""
        tokenizer = templated()
        target = loaded(self.folder / name, dtype)
        turns = [{"role": "user", "content": content}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = target.generate(**inputs, **settings)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def text_of(events: list[dict[str, Any]]) -> str:
    """What a stream of a chat wrote."""
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@dataclass
class Load:
    """What clients got.

    Attributes:
        answered: requests with a whole answer.
        cut_off: requests whose client left.
        answers: (what was asked, most tokens) -> the answer.
        faults: what went wrong, in words.
    """

    answered: int = 0
    cut_off: int = 0
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def run_load(client: Client, *, requests: int, clients: int) -> Load:
    """Send `requests` from `clients` at once: every third is streamed, and every seventh client leaves."""
    load = Load()

    def one(number: int) -> None:
        content, most = ("abd", "gfkgfk", "mno", "ddd")[number % 4], 4 + number % 5 * 3
        streams, leaves = number % 3 == 0, number % 7 == 3
        asked = {"model": client.target, "messages": [{"role": "user", "content": content}], "max_tokens": most}
        connection = client.send("/v1/chat/completions", asked | {"stream": streams})
        if leaves:
            if streams:
                connection.getresponse().read(20)
            connection.close()
            load.cut_off += 1
            return
        answer = connection.getresponse()
        text = _text(answer.read().decode(), streams) if answer.status == 200 else None
        connection.close()
        if text is None or load.answers.setdefault((content, most), text) != text:
            load.faults.append(f"request {number}: status {answer.status}, {text!r}")
        else:
            load.answered += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return load


def _text(answer: str, streams: bool) -> str | None:
    """The text of an answer; `None` where it has no end or no figures."""
    if not streams:
        whole = json.loads(answer)
        return whole["choices"][0]["message"]["content"] if "metrics" in whole else None
    events = [json.loads(event.removeprefix("data: ")) for event in answer.split("\n\n") if event]
    return text_of(events) if "metrics" in events[-1] else None


def save_target(folder: Path, seed: int = 0, **sizes: int) -> None:
    usual: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    usual |= {"initializer_range": 0.6, "eos_token_id": None}
    build_target(seed=seed, **usual, **sizes).save_pretrained(folder)
    templated().save_pretrained(folder)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two targets, of which the first has a head and the second MTP layers, served from a thread."""
    folder = tmp_path_factory.mktemp("served")
    save_target(folder / "target")
    save_target(folder / "other", seed=1)
    add_mtp_layer(folder / "other")
    torch.manual_seed(1)
    DraftHead.from_target(AutoModelForCausalLM.from_pretrained(folder / "target")).save_pretrained(folder / "head")
    with serving_from(folder, {"target": str(folder / "head"), "other": "mtp"}) as (port, models):
        yield Client(port, folder, models)


@pytest.fixture(scope="module")
def invariant_client(client: Client) -> Iterator[Client]:
    """The first of them, in the invariant mode and bfloat16."""
    heads = {"target": str(client.folder / "head")}
    with serving_from(client.folder, heads, dtype="bfloat16", invariant=True) as (port, _):
        yield Client(port, client.folder)


@contextmanager
def serving_from(
    folder: Path,
    heads: Mapping[str, str | None],
    dtype: str | None = None,
    *,
    invariant: bool = False,
    remembers: bool = False,
    **names: Any,
) -> Iterator[tuple[int, serving.AttachedModels]]:
    """The port of a server of these targets, and what it serves."""
    served = {str(folder / name): head for name, head in heads.items()}
    policy = "10,2,9,8" if remembers else "10,2,9"
    loading: dict[str, Any] = {"policy": policy, "compile": None, "device": "cpu", "packed": False}
    loading |= {"dtype": dtype, "invariant": invariant, "remembers": remembers}
    models = serving.AttachedModels(served, **loading, **names)
    app = serving.build_app(models)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1], models
        server.should_exit = True
        thread.join(timeout=300)
        assert not thread.is_alive()


def test_the_openai_client_reads_the_plain_answer_and_what_speculation_did(client: Client) -> None:
    answer = client.openai.chat.completions.create(model=client.target, messages=ASKED, max_tokens=20)
    assert answer.choices[0].message.content == client.plain(max_new_tokens=20)
    assert answer.choices[0].finish_reason == "length"
    told = answer.model_extra["metrics"]["speculative_decoding"]
    accepted = told["num_accepted_draft_tokens"]
    assert told["num_target_forwards"] + accepted == 20 and told["num_draft_tokens"] >= accepted > 0
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] == told["num_target_forwards"] - 1
    assert told["mean_tokens_per_forward"] == 20 / told["num_target_forwards"]


def test_a_stream_is_the_answer_and_its_last_chunk_has_the_figures(client: Client) -> None:
    chunks = list(
        client.openai.chat.completions.create(model=client.target, messages=ASKED, max_tokens=20, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == client.plain(max_new_tokens=20)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert [chunk for chunk in chunks if "metrics" in chunk.model_extra] == chunks[-1:]
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] > 0


def test_a_stream_counts_its_tokens_where_it_is_asked_to(client: Client) -> None:
    options = {"stream_options": {"include_usage": True}}
    *_, last, usage = client.stream({"messages": ASKED, "max_tokens": 20} | options)
    assert "metrics" in last and usage["usage"]["completion_tokens"] == 20 and usage["choices"] == []


def test_completions_and_responses_likewise(client: Client) -> None:
    asked: dict[str, Any] = {"model": client.target, "prompt": "abdabd", "max_tokens": 9}
    whole = client.openai.completions.create(**asked)
    chunks = list(client.openai.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    asked = {"model": client.target, "input": "abdabdabd", "max_output_tokens": 9}
    response = client.openai.responses.create(**asked)
    events = list(client.openai.responses.create(**asked, stream=True))
    assert response.output_text == client.plain(max_new_tokens=9)
    assert events[-1].type == "response.completed" and events[-1].response.output_text == response.output_text
    for told in (whole, chunks[-1], response, events[-1].response):
        assert told.model_extra["metrics"]["speculative_decoding"]["num_target_forwards"] <= 9


def test_a_seed_draws_what_plain_sampling_draws_with_it(client: Client) -> None:
    torch.manual_seed(5)
    plain = client.plain(do_sample=True, temperature=0.9, max_new_tokens=20)
    settings = json.dumps({"do_sample": True, "temperature": 0.9, "max_new_tokens": 20})
    asked: dict[str, Any] = {"messages": ASKED, "seed": 5, "generation_config": settings}
    run_load(client, requests=4, clients=2)  # others draw in between
    assert client.text(asked) == plain
    for request in (asked, {"messages": ASKED, "seed": 5, "temperature": 0.9, "max_tokens": 20}):
        assert text_of(client.stream(request)) == plain


@pytest.mark.parametrize("settings", [{"policy": "plain"}, {"generation_config": {"policy": "plain"}}])
def test_a_request_may_ask_for_plain_decoding(client: Client, settings: dict[str, Any]) -> None:
    answer = client.ask({"messages": ASKED, "max_tokens": 9} | settings)[1]
    assert answer["metrics"] == {"speculative_decoding": {"plain": "The request asks for it."}}
    assert answer["choices"][0]["message"]["content"] == client.plain(max_new_tokens=9)


def test_what_a_tree_cannot_do_is_decoded_plainly_and_marked(client: Client) -> None:
    settings = {"num_beams": 3, "max_new_tokens": 9}
    asked = {"messages": ASKED, "generation_config": json.dumps(settings)}
    plain = client.plain(**settings)
    answer = client.ask(asked)[1]
    assert answer["choices"][0]["message"]["content"] == plain != client.plain(max_new_tokens=9)
    assert "num_beams=3" in answer["metrics"]["speculative_decoding"]["plain"]
    streamed = client.stream(asked)
    assert text_of(streamed) == plain
    assert streamed[-1]["metrics"] == answer["metrics"]


def test_an_own_assistant_of_stock_is_plain_and_streamed_once(client: Client) -> None:
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 9}
    streamed = client.stream({"messages": ASKED, "generation_config": json.dumps(settings)})
    assert text_of(streamed) == client.plain(max_new_tokens=9)
    assert "prompt_lookup_num_tokens=3" in streamed[-1]["metrics"]["speculative_decoding"]["plain"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy", [None, "auto", "plain"])
def test_every_request_is_answered_in_the_invariant_mode(
    policy: str | None, stream: bool, invariant_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = invariant_client.plain(dtype="bfloat16", invariant=True, max_new_tokens=20)
    prefill, read = TextReader.read, list[TextReader]()

    def noted(self: TextReader, *given: Any) -> Any:
        read.append(self)
        return prefill(self, *given)

    monkeypatch.setattr(TextReader, "read", noted)
    asked = {"messages": ASKED, "max_tokens": 20, "policy": policy}
    if stream:
        events = invariant_client.stream(asked)
        text, metrics = text_of(events), events[-1]
    else:
        metrics = invariant_client.ask(asked)[1]
        text = metrics["choices"][0]["message"]["content"]
    assert text == expected and len(read) == 1
    told = metrics["metrics"]["speculative_decoding"]
    assert told == {"plain": "The request asks for it."} if policy == "plain" else told["num_spec_steps"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"guidance_scale": 2.0}, "`invariant=True` does not support `guidance_scale`"),
        ({"invariant": False}, "this server answers every request in the invariant mode. Leave it out"),
    ],
)
def test_what_the_invariant_mode_cannot_do_is_refused_and_not_decoded_plainly(
    settings: dict[str, Any], words: str, invariant_client: Client
) -> None:
    status, told = invariant_client.ask({"messages": ASKED, "max_tokens": 9, "generation_config": settings})
    assert status == 400 and words in told["error"]["message"]


def test_a_server_in_the_normal_mode_refuses_it_likewise_to_a_request_that_asks_for_the_mode(client: Client) -> None:
    asked = {"messages": ASKED, "max_tokens": 9, "generation_config": {"invariant": True}}
    assert client.text(asked) == client.plain(max_new_tokens=9, invariant=True)
    asked["generation_config"] |= {"guidance_scale": 2.0}
    status, told = client.ask(asked)
    assert status == 400 and "`guidance_scale`" in told["error"]["message"]


@pytest.mark.parametrize("name", ["the folder", "other"])
def test_each_model_answers_by_its_name_and_its_folders(client: Client, name: str) -> None:
    names = [model.id for model in client.openai.models.list()]
    assert names == [client.target, str(client.folder / "other")]
    asked = names[1] if name == "the folder" else name
    answer = client.ask({"model": asked, "messages": ASKED, "max_tokens": 9})[1]
    assert answer["model"] == asked
    assert answer["choices"][0]["message"]["content"] == client.plain(name="other", max_new_tokens=9)


def test_targets_have_the_names_that_clients_are_told(client: Client) -> None:
    with serving_from(client.folder, {"target": None, "other": None}, served=["small", "target"]) as (port, _):
        named = Client(port, client.folder)
        assert [model.id for model in named.openai.models.list()] == ["small", "target"]
        for asked, name in (("small", "target"), ("target", "other"), ("other", "other"), (client.target, "target")):
            answer = named.ask({"model": asked, "messages": ASKED, "max_tokens": 9})[1]
            assert answer["model"] == asked
            assert answer["choices"][0]["message"]["content"] == client.plain(name=name, max_new_tokens=9)


def test_an_answer_ends_where_the_model_has_no_positions_left(client: Client) -> None:
    answer = client.ask({"messages": ASKED})[1]
    assert answer["usage"]["total_tokens"] == LENGTH and answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == client.plain(max_length=LENGTH)


def test_a_model_without_a_number_of_positions_is_limited_by_the_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba's and Bloom's configurations name none."""
    monkeypatch.setattr(serving, "_positions", lambda model: None)
    asked = {"messages": ASKED, "generation_config": {"max_length": 30, "max_new_tokens": 100}}
    assert client.text({"messages": ASKED, "max_tokens": 9}) == client.plain(max_new_tokens=9)
    assert client.ask(asked)[1]["usage"]["total_tokens"] == 30


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other/model"}, 404, "is not served here"),
        ({"model": None}, 404, "is not served here"),
        ({"model": ["a"]}, 404, "is not served here"),
        ({"messages": []}, 400, "`messages` is missing or empty"),
        ({"messages": [{"content": "a"}]}, 400, "KeyError: 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "could not be read"),
        ({"messages": [{"role": "user", "content": "a" * 70}]}, 400, "74 tokens, but the model reads 64"),
        ({"n": 2}, 400, "`n` with the value 2"),
        ({"logprobs": True}, 400, "`logprobs`"),
        ({"response_format": {"type": "json_object"}}, 400, "`response_format`"),
        ({"policy": "/etc"}, 400, "'auto' or 'plain' only"),
        ({"generation_config": {"policy": "owner/name"}}, 400, "'auto' or 'plain' only"),
        ({"generation_config": "{"}, 400, "could not be read"),
        ({"generation_config": {"num_return_sequences": 2}}, 400, "`num_return_sequences`"),
        ({"generation_config": {"assistant_model": "owner/name"}}, 400, "has no ['assistant_model']"),
        ({"max_tokens": "many"}, 400, "could not be read"),
        ({"max_tokens": 0}, 400, "`max_tokens` is 0, but an answer has at least one token. Leave it out."),
        ({"max_completion_tokens": -1}, 400, "`max_completion_tokens` is -1"),
        ({"logit_bias": {"3": "much"}}, 400, "could not be read"),
        ({"temperature": -1, "generation_config": {"do_sample": True}}, 400, "The temperature is -1.0"),
        ({"temperature": -0.5}, 400, "The temperature is -0.5"),
        ({"generation_config": {"temperature": -2}}, 400, "The temperature is -2"),
        ({"tools": [TOOL]}, 400, "knows no `tools`"),
        ({"messages": [*ASKED, CALLED, *ASKED]}, 400, "knows no `tool_calls`"),
        ({"messages": [{"role": "user", "content": [TEXT, IMAGE]}]}, 400, "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "'input_audio'"),
        ({"verbosity": "low"}, 400, "`verbosity`"),
        ({"seed": "5"}, 400, "`seed`"),
        ({"beam": 2}, 422, "Unexpected fields"),
    ],
)
def test_a_bad_request_is_told_why(client: Client, body: dict[str, Any], status: int, words: str) -> None:
    found, told = client.ask({"messages": ASKED} | body)
    assert found == status and words in told["error"]["message"], told
    assert client.ask({"messages": ASKED, "max_tokens": 2})[0] == 200


def test_the_other_endpoints_drop_nothing_either(client: Client) -> None:
    asked = {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA"}]}]
    }
    flat = {"type": "function", "name": "look", "parameters": {}}
    for body, path, words in (
        (asked, "/v1/responses", "'input_image'"),
        ({"input": "ab", "tools": [flat]}, "/v1/responses", "knows no `tools`"),
        ({"input": "ab", "conversation": "one"}, "/v1/responses", "`conversation`"),
        ({"prompt": "ab", "logit_bias": {"3": 1}}, "/v1/completions", "`logit_bias`"),
        ({"prompt": "ab", "temperature": -1}, "/v1/completions", "The temperature is -1.0"),
    ):
        status, told = client.ask(body, path)
        assert status == 400 and words in told["error"]["message"], told


def test_tools_reach_a_template_that_knows_them(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names and no more, as a target reads few tokens here."""
    processor = client.models.get_engine(client.target).processor
    names = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", names + processor.chat_template)
    without, told = (client.ask({"messages": ASKED, "max_tokens": 2, "tools": tools})[1] for tools in ([], [TOOL]))
    assert told["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]


def test_a_bias_may_be_a_whole_number(client: Client) -> None:
    asked = {"messages": ASKED, "max_tokens": 9}
    biased = client.text(asked | {"logit_bias": {"3": 100}})
    assert biased == client.plain("ab", max_new_tokens=9, sequence_bias={(3,): 100.0}) != client.text(asked)


def test_parts_of_text_are_read_together(client: Client) -> None:
    parts = [{"role": "user", "content": [TEXT, TEXT]}]
    assert client.text({"messages": parts, "max_tokens": 9}) == client.plain("ab ab", max_new_tokens=9)


def test_the_figures_count_a_refusal_as_refused(client: Client) -> None:
    """Also where the client closes its connection with the answer, as most do."""
    names = [f'resps_requests_total{{outcome="{outcome}"}}' for outcome in ("refused", "left")]
    before = client.metrics()
    refused: list[dict[str, Any]] = [{"messages": []}, {"n": 2}, {"temperature": -1}, {"tools": [TOOL]}, {"seed": "5"}]
    assert [client.ask({"messages": ASKED} | body)[0] for body in refused * 2] == [400] * 10
    after = client.metrics()
    assert [after.get(name, 0) - before.get(name, 0) for name in names] == [10, 0]


def test_a_body_that_is_no_json_or_too_large_is_refused(client: Client) -> None:
    status, told = client.ask(b'{"messages": [')
    assert status == 400 and "is no JSON object" in told["error"]["message"]
    status, told = client.ask(b'{"messages": "' + b"a" * 100_000_000)
    assert status == 413 and "33,554,432 bytes" in told["error"]["message"]
    assert client.ask({"messages": ASKED, "max_tokens": 2})[0] == 200


class Gate:
    """Lets the steps of `TreeDecoding` pass when a test opens it, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.arrived, self.opened = 0, threading.Event(), threading.Event()
        step = TreeDecoding.step

        def counted(decoding: TreeDecoding) -> None:
            self.steps += 1
            self.arrived.set()
            assert self.opened.wait(300)
            step(decoding)

        monkeypatch.setattr(TreeDecoding, "step", counted)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model_within_one_step(
    client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    before = client.metrics().get('resps_requests_total{outcome="left"}', 0)
    leave, noticed = serving.Exchange.leave, threading.Semaphore(0)
    with monkeypatch.context() as patch:
        patch.setattr(serving.Exchange, "leave", lambda exchange: (leave(exchange), noticed.release()))
        gate = Gate(patch)
        connection = client.send(
            "/v1/chat/completions", {"model": client.target, "messages": ASKED, "stream": stream, "max_tokens": 40}
        )
        assert gate.arrived.wait(300)
        waiting = client.send("/v1/chat/completions", {"model": client.target, "messages": ASKED, "max_tokens": 40})
        waiting.close()  # leaves before its turn has come
        connection.close()
        assert all(noticed.acquire(timeout=300) for _ in range(2))  # by the event loop
        gate.opened.set()
        answer = client.ask({"model": str(client.folder / "other"), "messages": ASKED, "policy": "plain"})
    assert answer[0] == 200 and gate.steps == 1
    assert client.metrics()['resps_requests_total{outcome="left"}'] == before + 2


def test_an_error_in_the_middle_of_a_stream_is_told_and_the_server_lives(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TreeDecoding.step

    def broken(decoding: TreeDecoding) -> None:
        if len(decoding.report.steps) > 2:
            raise RuntimeError('no "memory"\n\nleft')
        step(decoding)

    before = client.metrics().get('resps_requests_total{outcome="failed"}', 0)
    with monkeypatch.context() as patch:
        patch.setattr(TreeDecoding, "step", broken)
        with pytest.raises(openai.APIError, match='no "memory"'):
            list(client.openai.chat.completions.create(model=client.target, messages=ASKED, stream=True))
        with pytest.raises(openai.InternalServerError, match="memory"):
            client.openai.chat.completions.create(model=client.target, messages=ASKED)
    assert client.metrics()['resps_requests_total{outcome="failed"}'] == before + 2
    assert client.text({"messages": ASKED, "max_tokens": 9}) == client.plain(max_new_tokens=9)


def test_what_generate_refuses_in_a_stream_is_the_clients_fault(client: Client) -> None:
    (_, told) = client.stream({"messages": ASKED, "logit_bias": {"99999": 1}})
    assert told["error"]["code"] == 400 and "vocabulary size" in told["error"]["message"]


def test_no_client_drops_models_or_loads_others(client: Client) -> None:
    assert client.ask({}, "/reset")[0] == 404
    assert client.ask({"model": "a", "questions": []}, "/v1/systemone")[0] == 404
    loaded = client.send("/load_model", {"model": "owner/other"}).getresponse().read().decode()
    assert "is not served here" in loaded


def test_the_figures_of_the_server_are_the_sums_of_its_answers(client: Client) -> None:
    before = client.metrics()
    answers = [client.ask({"messages": ASKED, "max_tokens": 8, "policy": policy})[1] for policy in (None, "plain")]
    after, told = client.metrics(), answers[0]["metrics"]["speculative_decoding"]

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained("resps_emitted_tokens_total") == 16
    assert gained("resps_prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert gained("resps_target_forwards_total") == told["num_target_forwards"]
    assert gained("vllm:spec_decode_num_drafts_total") == told["num_spec_steps"]
    assert gained("vllm:spec_decode_num_draft_tokens_total") == told["num_draft_tokens"]
    assert gained("vllm:spec_decode_num_accepted_tokens_total") == told["num_accepted_draft_tokens"]
    assert (
        gained('resps_requests_total{outcome="speculative"}') == gained('resps_requests_total{outcome="plain"}') == 1
    )
    assert after["resps_requests_in_progress"] == 0


def test_many_clients_at_once_lose_nothing_and_read_plain_answers(client: Client) -> None:
    done = run_load(client, requests=20, clients=4)
    assert done.answered + done.cut_off == 20 and done.cut_off > 0 and not done.faults
    assert all(text == client.plain(content, max_new_tokens=count) for (content, count), text in done.answers.items())


def test_the_command_serves_until_it_is_interrupted(client: Client) -> None:
    command = [sys.executable, "-m", "resps", "serve", client.target, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell lets its background ignore it
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith(f"Serving {client.target} at http://127.0.0.1:"), process.stderr.read()
        own = Client(int(line.split("/v1")[0].rpartition(":")[2]), client.folder)
        assert own.text({"messages": ASKED, "max_tokens": 9}) == client.plain(max_new_tokens=9)
        own.send("/v1/chat/completions", {"messages": ASKED, "stream": True})
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 130
        assert "Traceback" not in (told := process.stderr.read()) and "resps serve: stopped." in told
        assert re.search(r" /v1/chat/completions speculative, \d+ \+ 9 tokens, [\d.]+ per forward, ", told)
        assert "A seed may not repeat" not in told, "it repeats in float32"


def test_in_half_precision_a_seed_repeats_in_the_invariant_mode_alone(client: Client) -> None:
    head = str(client.folder / "head")
    for dtype, invariant in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        with serving_from(client.folder, {"target": head}, dtype=dtype, invariant=invariant) as (_, models):
            assert models.repeats_seeds is (invariant or dtype == "float32")


@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantized_target_answers_as_it_does_alone(tmp_path: Path, name: str, library: str) -> None:
    pytest.importorskip(library)
    save_target(tmp_path / "target", hidden_size=64, intermediate_size=64)  # bitsandbytes fails with fewer inputs
    head = DraftHead.from_target(AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    head.save_pretrained(tmp_path / "head")
    with serving_from(tmp_path, {"target": str(tmp_path / "head")}, quantization=name) as (port, models):
        own = Client(port, tmp_path)
        target = models.get_engine(own.target).model
        plain = own.text({"messages": ASKED, "max_tokens": 9, "policy": "plain"})
        drafted = own.ask({"messages": ASKED, "max_tokens": 9})[1]
    prompt = templated().apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    alone = load_target(own.target, None, "cpu", quantization=name)
    answer = alone.generate(**prompt, max_new_tokens=9)[0, prompt["input_ids"].shape[1] :]
    assert plain == templated().decode(answer, skip_special_tokens=True)
    assert drafted["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0
    assert target.hf_quantizer.quantization_config.to_dict() == alone.hf_quantizer.quantization_config.to_dict()


def test_each_key_is_drafted_from_what_its_own_requests_wrote(client: Client) -> None:
    with serving_from(client.folder, {"target": str(client.folder / "head")}, remembers=True) as (port, _):

        def forwards(key: str | None) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            login = {} if key is None else {"authorization": f"Bearer {key}"}
            login |= {"content-type": "application/json"}
            body = {"model": client.target, "messages": ASKED, "max_tokens": 20, "seed": 3, "temperature": 1.0}
            connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), login)
            told = json.loads(connection.getresponse().read())["metrics"]["speculative_decoding"]
            return told["num_target_forwards"]

        alone = [forwards(None), forwards("none"), forwards(None)]
        assert len(set(alone)) == 1, "without a key nothing is remembered"
        first, second = forwards("one"), forwards("one")
        assert first == alone[0] and second < 0.7 * first
        assert forwards("another") == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("TARGET --policy 10,2,9 --memory", "which `--policy 10,2,9` never does. Add a fourth number."),
        ("TARGET --head HEAD --head HEAD", "Got 2 heads for 1 targets"),
        ("TARGET --served-model-name a --served-model-name a", "Got the served names ['a', 'a']"),
        ("TARGET TARGET --served-model-name a --served-model-name a", "Got the served names ['a', 'a']"),
        ("TARGET --port PORT", "Address already in use"),
        ("TARGET --port 0 --device cpu --compile auto --invariant", "compile='auto', which goes by the clock"),
    ],
)
def test_a_server_that_cannot_be_is_refused_before_anything_is_loaded(
    options: str, words: str, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"TARGET": client.target, "HEAD": str(client.folder / "head"), "PORT": str(client.port)}
    assert main(["serve", *(given.get(word, word) for word in options.split())]) == 2
    assert words in capsys.readouterr().err
