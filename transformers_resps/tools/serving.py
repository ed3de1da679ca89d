"""The server of `transformers serve`, changed to serve attached models.

In reading order: one request, the engine that answers it, the served models, the handlers of OpenAI's endpoints, the
figures of `/metrics`, and `Door`, the outermost layer. Transformers runs each model in a process of its own; here all
models are in this process, and one thread answers one request at a time. The classes of Transformers' server are
private and may change, so `check_release` checks the signatures of the installed release.
"""

import asyncio
import copy
import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import PurePath
from threading import Event
from typing import Any, cast

import torch
import transformers
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving import chat_completion, completion, response, server, utils
from transformers.cli.serving.model_manager import EngineClient, ModelLoader, ModelManager

from ..drafting.suffix_memory import SuffixMemory
from ..generation.attach import attach
from ..policies.base import Policy
from ..policies.fixed import FixedPolicy
from ..telemetry.report import SpeculationReport
from ..testing.divergence import HALF_PRECISIONS
from ..tree import TreeShape
from .loading import load_policy, load_source, load_target


MAX_BODY_BYTES = 32 << 20
_DEFAULT_NEW_TOKENS = 1024  # for requests without a limit, as in Transformers' server
_SHUTDOWN_SECONDS = 60.0  # at shutdown, how long to wait for the running step
_MOST_MEMORIES = 64  # most memories that are kept; each has up to a million tokens of 12 bytes
_NO_KEY = (None, b"", b"Bearer", b"Bearer none")  # clients without a key send "Bearer none"
_CLIENT_LEFT = 499  # nginx's HTTP status for a disconnected client; only logs show it
_BAD_REQUEST = (LookupError, TypeError, ValueError, AttributeError, TemplateError)
_FAILURES = (*_BAD_REQUEST, RuntimeError, OSError, ImportError)
logger = logging.getLogger(f"transformers.{__name__}")


class ClientLeftError(Exception):
    """Raised inside `generate` to stop it because the client has disconnected."""


@dataclass(slots=True)
class Exchange:
    """An HTTP request and its outcome; the event loop and the worker thread share this object."""

    over: Event = field(default_factory=Event)  # set when the answer is complete or no longer needed
    has_left: bool = False  # whether the client disconnected before its answer was complete
    caller: bytes | None = None  # hash of the client's API key
    policy: str | None = None  # "auto", "plain", or None for the policy of the server
    seed: int | None = None
    ended: bool = False  # whether `generate` has returned or failed
    report: SpeculationReport | None = None  # None for plain decoding
    plain_reason: str | None = None  # why the request was decoded plainly
    error: str | None = None  # message of an error in `generate`
    status: int = 200  # HTTP status: 400 for a request that cannot be answered, 500 for a fault of the server
    prompt_tokens: int = 0  # length of the prompt of an answered request; 0 before the answer
    emitted_tokens: int = 0

    @property
    def metrics(self) -> dict[str, Any]:
        told = {"plain": self.plain_reason} if self.report is None else self.report.acceptance()
        return {"speculative_decoding": told}

    @property
    def outcome(self) -> str:
        if self.error is not None:
            return "failed" if self.status >= 500 else "refused"
        if not self.ended:
            return "left" if self.has_left else "refused"
        return "plain" if self.report is None else "speculative"

    @property
    def figures(self) -> dict[str, float]:
        """Numbers that this request, once finished, adds to the counters of `/metrics`, by counter name."""
        figures: dict[str, float] = {
            f'resps_requests_total{{outcome="{self.outcome}"}}': 1,
            "resps_prompt_tokens_total": self.prompt_tokens,
            "resps_emitted_tokens_total": self.emitted_tokens,
        }
        if self.report is None:
            return figures
        told = self.report.acceptance()
        return figures | {
            "resps_target_forwards_total": told["num_target_forwards"],
            "vllm:spec_decode_num_drafts_total": told["num_spec_steps"],
            "vllm:spec_decode_num_draft_tokens_total": told["num_draft_tokens"],
            "vllm:spec_decode_num_accepted_tokens_total": told["num_accepted_draft_tokens"],
            "resps_speculation_seconds_total": self.report.seconds,
        }

    @property
    def summary(self) -> str:
        """One line for the log: the outcome, lengths and speed, or why there were no drafts."""
        told = f"{self.outcome}, {self.prompt_tokens} + {self.emitted_tokens} tokens"
        if self.report is not None:
            told += f", {self.report.tau:.2f} per forward, {self.report.tokens_per_second:.1f} tokens/s"
        why = self.error or self.plain_reason
        return told if why is None else f"{told}: {why}"

    def fail(self, error: Exception) -> None:
        """Record an error in `generate`; of two, the first."""
        if self.error is None:
            self.status = 400 if isinstance(error, ValueError) else 500
            self.error, self.ended = f"{type(error).__name__}: {error}", True

    def leave(self) -> None:
        """Record that the client has disconnected, and set `has_left` unless its answer was complete."""
        self.has_left |= not self.over.is_set()
        self.over.set()


_exchange: ContextVar[Exchange] = ContextVar("resps_exchange")


class _Watch(StoppingCriteria):
    """A streamer (for beam search, a stopping criterion) that stops `generate` after the client has disconnected.

    It passes new tokens to `deliver`, if there is one.
    """

    def __init__(self, deliver: Callable[[list[int]], Any] | None, over: Event) -> None:
        self._deliver, self._over = deliver, over
        self._expects_prompt = self.has_tokens = False

    def start(self) -> None:
        """Prepare for a call of `generate`, which passes the prompt to `put` before new tokens."""
        self._expects_prompt = True
        self.check()

    def check(self) -> None:
        if self._over.is_set():
            raise ClientLeftError("the client has left")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def put(self, value: Tensor) -> None:
        self.check()
        if self._expects_prompt:
            self._expects_prompt = False
            return
        self.has_tokens = True
        if self._deliver is not None:
            self._deliver(value.flatten().tolist())

    def end(self) -> None:
        pass


class AttachedEngine(EngineClient):
    """An attached model as Transformers' handlers use it; `worker` runs its requests.

    `memory_of` gives the memory to draft from of the client with a key; `None` without memories.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        worker: ThreadPoolExecutor,
        memory_of: Callable[[bytes, int], SuffixMemory] | None,
    ) -> None:
        super().__init__(name, ModelLoader())
        self.model, self._worker, self._memory_of = model, worker, memory_of
        self.generation_config = model.generation_config

    @property
    def process_running(self) -> bool:
        return True

    async def _send_request(self, method: str, args: tuple[Any, ...], streamer: Any = None) -> list[int]:
        """Return the tokens of an answer; with a `streamer`, deliver each as it comes."""
        inputs, settings = args
        _fit(settings, inputs["input_ids"].shape[1], self.model)
        loop, exchange = asyncio.get_running_loop(), _exchange.get()

        def deliver(tokens: list[int]) -> None:
            try:
                for token in tokens:
                    streamer.put_token(token)
            except _FAILURES as error:  # the tokens are no answer in the form of the model's template
                exchange.fail(error)
                exchange.over.set()

        put = None if streamer is None else lambda tokens: loop.call_soon_threadsafe(deliver, tokens)
        return await loop.run_in_executor(self._worker, self._answer, exchange, inputs, settings, put)

    def _answer(
        self, exchange: Exchange, inputs: Any, settings: dict[str, Any], put: Callable[[list[int]], Any] | None
    ) -> list[int]:
        watch = _Watch(put, exchange.over)
        given = {
            name: value.to(self.model.device) if torch.is_tensor(value) else value for name, value in inputs.items()
        }
        given |= {name: value for name, value in settings.items() if value is not None}
        given |= {"tokenizer": self.processor, "return_dict_in_generate": True}
        try:
            watch.check()
            sequences = self._drafted_or_plain(exchange, watch, given)
        except _FAILURES as error:
            exchange.fail(error)
            raise
        length = exchange.prompt_tokens = inputs["input_ids"].shape[1]
        exchange.ended, exchange.emitted_tokens = True, sequences.shape[1] - length
        return cast(list[int], sequences[0, length:].tolist())

    def _drafted_or_plain(self, exchange: Exchange, watch: _Watch, given: dict[str, Any]) -> Tensor:
        """Return prompt and answer `[1, s + t]`; if trees cannot be used, decode plainly or, in exact mode, raise."""
        is_invariant = given.get("invariant") or self.model.speculation_state.defaults.invariant
        if exchange.policy == "plain":
            exchange.plain_reason = "The request asks for it."
        else:
            try:
                out = self._decode(exchange, watch, given, exchange.policy)
                exchange.report = out.speculation
                return cast(Tensor, out.sequences)
            except ValueError as refusal:
                if watch.has_tokens or is_invariant:  # plain decoding rounds differently
                    raise
                exchange.plain_reason = str(refusal)
        plain = FixedPolicy(TreeShape.plain()) if is_invariant else "plain"
        return cast(Tensor, self._decode(exchange, watch, given, plain).sequences)

    def _decode(self, exchange: Exchange, watch: _Watch, given: dict[str, Any], policy: Policy | str | None) -> Any:
        if exchange.seed is not None:
            torch.manual_seed(exchange.seed)
        beams = given.get("num_beams") or self.generation_config.num_beams or 1
        added: dict[str, Any] = {"streamer": watch}
        if beams > 1:  # beam search takes no streamer
            added = {"stopping_criteria": StoppingCriteriaList([watch])}
        if self._memory_of is not None and exchange.caller and policy in (None, "auto"):
            memory = self._memory_of(exchange.caller, id(self.model))
            added["assistant_model"] = [*self.model.speculation_state.defaults.assistants, memory]
        watch.start()
        out = self.model.generate(**given, **added, policy=policy)
        if beams > 1:
            length = given["input_ids"].shape[1]
            watch.put(out.sequences[0, :length].cpu())
            watch.put(out.sequences[0, length:].cpu())
        return out


def _positions(model: PreTrainedModel) -> int | None:
    """Most positions of prompt and answer, if the configuration names them."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def _fit(settings: dict[str, Any], length: int, model: PreTrainedModel) -> None:
    """Limit `max_new_tokens`, after a prompt of `length` tokens, to the model's remaining positions."""
    limits = [limit - length for limit in (settings.pop("max_length", None), _positions(model)) if limit is not None]
    asked = settings["max_new_tokens"]
    settings["max_new_tokens"] = min([_DEFAULT_NEW_TOKENS if asked is None else asked, *limits])


class AttachedModels(ModelManager):
    """Loads and attaches the targets of the command line, once each, and serves no other models.

    One thread answers the requests to all models one by one, since they share the random generator and cores;
    `shutdown` waits for it. `heads` maps the name of each target to the name of its head. `served` are the names that
    clients use for the targets, in the same order; empty for the targets' own names. `policy` is a name for
    `load_policy`, `compile` and `invariant` are as in `attach`, and `loading` are keywords of `load_target`.

    If it `remembers`, it stores texts for later drafts in a memory for each API key and model, so that no caller
    drafts from others' texts. The most recently used memories are kept. Requests without a key have no memory.
    """

    def __init__(
        self,
        heads: Mapping[str, str | None],
        *,
        served: Sequence[str] = (),
        policy: str | None,
        compile: Any,
        invariant: bool,
        remembers: bool,
        **loading: Any,
    ) -> None:
        super().__init__(model_timeout=-1)  # never unloaded
        self.names, self.is_invariant = list(served or heads), invariant
        folders = Counter(PurePath(target).name for target in heads)
        # A request may name a target by its folder's name, if unique, by its own name, or by its served name
        self._targets = {folder: target for target in heads if folders[folder := PurePath(target).name] == 1}
        self._targets |= dict(zip(heads, heads, strict=True)) | dict(zip(self.names, heads, strict=True))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generate")
        memory_of = lru_cache(_MOST_MEMORIES)(lambda caller, model: SuffixMemory()) if remembers else None
        for name, head_name in heads.items():
            target = load_target(name, **loading)
            head = load_source(head_name, target)
            defaults: dict[str, Any] = {"compile": compile, "invariant": invariant or None}
            model = attach(target, assistant_model=head, policy=load_policy(policy, head), **defaults)
            if invariant:  # raises now if the mode does not support the model
                token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                model.generate(token, attention_mask=torch.ones_like(token), max_new_tokens=1, invariant=True)
            self.engines[name] = AttachedEngine(name, model, self._worker, memory_of)

    def get_engine(self, model: Any) -> AttachedEngine:
        """Return the engine of a target as a request names it; `None` is enough if only one target is served."""
        if model is None and len(self.names) == 1:
            model = self.names[0]
        if not isinstance(model, str) or model not in self._targets:
            raise HTTPException(404, f"The model {model!r} is not served here. Ask for one of {self.names}.")
        engine = cast(AttachedEngine, copy.copy(self.engines[self._targets[model]]))
        engine.model_id = model  # answers have the name that was asked for
        return engine

    @property
    def repeats_seeds(self) -> bool:
        """Whether a seed repeats an answer whatever was drafted; in half precision only the invariant mode does."""
        halves = any(cast(AttachedEngine, engine).model.dtype in HALF_PRECISIONS for engine in self.engines.values())
        return self.is_invariant or not halves

    def list_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": 0, "owned_by": "resps"} for name in self.names]

    def shutdown(self) -> None:
        self._worker.submit(int).result(timeout=_SHUTDOWN_SECONDS)  # all requests before this one have ended then
        super().shutdown()


# Unsupported field -> values that change nothing. Any other value is an error.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto",),
    "functions": ([],),
    "include": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}
# Fields that are ignored, since the answer is valid without them.
_HINTS = frozenset(
    ("max_tool_calls", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options")
    + ("prompt_cache_retention", "reasoning", "reasoning_effort", "safety_identifier", "service_tier", "store")
    + ("stream_options", "truncation", "user")
)
_READ = frozenset(("generation_config", "model", "seed", "stream", "temperature", "top_p"))
_SAMPLING = frozenset(("frequency_penalty", "max_tokens", "stop"))  # only chats and completions read these
_LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
_TEXTS = ("text", "input_text", "output_text")  # types of the text parts of a message
# Names of `generation_config`: other arguments of `generate` could make it load files
_SETTINGS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"invariant", "policy"}


class _Handler(utils.BaseHandler):
    """Base class of the endpoints' handlers: refuses requests with unsupported fields, adds `metrics` to answers."""

    needs: str  # name of the field with the prompt
    reads: frozenset[str]  # names of further supported fields

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        exchange = _exchange.get()
        try:
            return await cast(Any, super()).handle_request(body, request_id)
        except ClientLeftError:
            if exchange.error is None:
                return Response(status_code=_CLIENT_LEFT)
            raise HTTPException(exchange.status, exchange.error) from None
        except _FAILURES as error:
            if exchange.error is not None:
                raise HTTPException(exchange.status, exchange.error) from error
            if not isinstance(error, _BAD_REQUEST):
                raise
            told = f"The request could not be read ({type(error).__name__}: {error}). See OpenAI's description of it."
            raise HTTPException(400, told) from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        exchange = _exchange.get()
        exchange.policy = _checked_policy(body.pop("policy", None))
        super()._validate_request(body)
        for name in sorted(body.keys() - _READ - self.reads - _HINTS - {self.needs}):
            if body[name] is not None and body[name] not in _NEUTRAL.get(name, ()):
                raise HTTPException(400, f"`{name}` with the value {body[name]!r} is not supported. Leave it out.")
        if not isinstance(body.get(self.needs), str | list) or not body[self.needs]:
            raise HTTPException(400, f"`{self.needs}` is missing or empty. Write what the model shall answer.")
        for name in _LENGTHS & self.reads:
            if isinstance(length := body.get(name), int) and length < 1:
                raise HTTPException(400, f"`{name}` is {length}, but an answer has at least one token. Leave it out.")
        if isinstance(biases := body.get("logit_bias"), dict):  # `generate` takes floats only
            body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
        body.setdefault("stream", False)  # OpenAI's default; Transformers would stream responses
        engine = self.model_manager.get_engine(body.get("model"))
        self._check_tools(body, str(getattr(engine.processor, "chat_template", None)))

    def _check_tools(self, body: dict[str, Any], template: str) -> None:
        """Raise if the request has tools or tool calls that the chat template would ignore."""
        turns = [turn for turn in body[self.needs] if isinstance(turn, dict)]
        called = any(turn.get("tool_calls") or turn.get("type") == "function_call" for turn in turns)
        for name, is_asked in (("tools", body.get("tools")), ("tool_calls", called)):
            if is_asked and not re.search(rf"\b{name}\b", template):
                told = f"The chat template of this model knows no `{name}`, so it would not see them. Leave them out."
                raise HTTPException(400, told)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> Any:
        """Convert messages as Transformers does, but raise if Transformers would silently drop a part of them."""
        read = utils.BaseHandler.get_processor_inputs_from_messages
        for message in messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                alone: list[dict[str, Any]] = [{"role": "user", "content": [part]}]
                if part["type"] not in _TEXTS and not read(alone, modality)[0]["content"]:
                    told = f"This model reads no parts of the type {part['type']!r}. Send text, or ask another model."
                    raise HTTPException(400, told)
        return read(messages, modality)

    def _check_prompt_length(self, engine: Any, inputs: Any) -> None:
        length, most = inputs["input_ids"].shape[1], _positions(engine.model)
        if not length:
            raise HTTPException(400, "The prompt has no tokens. Write at least one word.")
        if most is not None and length >= most:
            raise HTTPException(
                400, f"The prompt has {length} tokens, but the model reads {most} with the answer. Send a shorter one."
            )

    def _build_generation_kwargs(self, body: dict[str, Any], *args: Any) -> dict[str, Any]:
        exchange = _exchange.get()
        seed = body.pop("seed", None)  # Transformers takes other seeds
        if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
            raise HTTPException(400, f"`seed` is {seed!r}, but must be an integer of 64 bits.")
        exchange.seed = seed
        asked = body.get("generation_config")
        if isinstance(asked, dict):  # Transformers expects a JSON string
            body["generation_config"] = json.dumps(asked)
        settings = cast(dict[str, Any], super()._build_generation_kwargs(body, *args))
        if asked is not None and (unknown := json.loads(body["generation_config"]).keys() - _SETTINGS):
            raise HTTPException(400, f"`generation_config` has no {sorted(unknown)}. Leave it out.")
        temperature = settings.get("temperature")
        if temperature is not None and not temperature >= 0:  # unchecked by `generate` if greedy
            raise HTTPException(400, f"The temperature is {temperature}. Write 0 for greedy, or a number above 0.")
        if (body.get("temperature") or 0) > 0:  # Transformers would leave a greedy model greedy
            settings["do_sample"] = True
        if settings.get("invariant") is False and cast(AttachedModels, self.model_manager).is_invariant:
            told = "`invariant` is False, but this server answers every request in the invariant mode. Leave it out."
            raise HTTPException(400, told)
        policy = settings.pop("policy", None)
        exchange.policy = exchange.policy or _checked_policy(policy)
        if (settings.get("num_return_sequences") or 1) > 1:
            raise HTTPException(
                400, "`num_return_sequences` above 1 is not supported. Send the request again for more."
            )
        return settings

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        answer: Response = await cast(Any, super())._non_streaming(*args, **kwargs)
        return JSONResponse(json.loads(bytes(answer.body)) | {"metrics": _exchange.get().metrics})

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        answer: StreamingResponse = cast(Any, super())._streaming(*args, **kwargs)
        answer.body_iterator = _with_metrics(cast(AsyncIterator[str], answer.body_iterator), _exchange.get())
        return answer


class ChatHandler(_Handler, chat_completion.ChatCompletionHandler):
    """Handles `/v1/chat/completions`."""

    needs = "messages"
    reads = _SAMPLING | {"chat_template_kwargs", "logit_bias", "max_completion_tokens", "tools"}


class CompletionHandler(_Handler, completion.CompletionHandler):
    """Handles `/v1/completions`."""

    needs = "prompt"
    reads = _SAMPLING | {"suffix"}


class ResponseHandler(_Handler, response.ResponseHandler):
    """Handles `/v1/responses`."""

    needs = "input"
    reads = frozenset(("chat_template_kwargs", "instructions", "max_output_tokens", "tools"))


def _checked_policy(policy: Any) -> str | None:
    """Return a request's policy; raise unless it is built in, since requests must not make the server load files."""
    if policy not in (None, "auto", "plain"):
        raise HTTPException(400, f"`policy` is {policy!r}, but a request may ask for 'auto' or 'plain' only.")
    return policy


async def _with_metrics(parts: AsyncIterator[str], exchange: Exchange) -> AsyncIterator[str]:
    """Add the request's metrics to the last chunk of a server-sent stream; convert errors to OpenAI's format."""
    async for part in parts:
        if not exchange.ended:
            yield part
            continue
        before, mark, _ = part.partition('data: {"error": ')  # Transformers does not escape the error's text
        if mark:
            yield before + _event(_error_body(exchange.status, str(exchange.error)))
            continue
        events = [json.loads(event.removeprefix("data: ")) for event in part.split("\n\n") if event]
        for event in events:
            if any(choice.get("finish_reason") for choice in event.get("choices") or ()):
                event["metrics"] = exchange.metrics
            elif event.get("type") == "response.completed":
                event["response"]["metrics"] = exchange.metrics
        yield "".join(map(_event, events))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error_body(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error in OpenAI's format, so that OpenAI's client shows the message."""
    error_type = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": error_type, "code": status}}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_body(status, message), status)


_FIGURES = {
    "resps_requests_total": "Requests, by what came of them.",
    "resps_prompt_tokens_total": "Tokens of the prompts that were answered.",
    "resps_emitted_tokens_total": "Tokens of the answers.",
    "resps_target_forwards_total": "Forwards of the target, of answers with draft trees.",
    # vLLM's names, which the benchmark AIPerf reads
    "vllm:spec_decode_num_drafts_total": "Steps after the prompt, of answers with draft trees.",
    "vllm:spec_decode_num_draft_tokens_total": "Drafted tokens that the target verified.",
    "vllm:spec_decode_num_accepted_tokens_total": "Drafted tokens that the target accepted.",
    "resps_speculation_seconds_total": "Seconds of the steps of answers with draft trees.",
    "resps_requests_in_progress": "Requests that wait or are answered.",
}


def prometheus_text(figures: Mapping[str, float]) -> str:
    """Format `figures`, counted since the server's start, in Prometheus' text format."""
    lines = []
    for name, text in _FIGURES.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
        lines += [f"{key} {value}" for key, value in sorted(figures.items()) if key.partition("{")[0] == name]
    return "\n".join(lines) + "\n"


class Door:
    """The outermost ASGI layer: limits body sizes, notices disconnected clients, counts requests by outcome."""

    _ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

    def __init__(self, app: ASGIApp, figures: "Counter[str]") -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        login = dict(scope["headers"]).get(b"authorization")
        exchange = Exchange(caller=sha256(login).digest() if login not in _NO_KEY else None)
        _exchange.set(exchange)
        is_counted = scope["path"] in self._ANSWERING
        self._figures["resps_requests_in_progress"] += is_counted
        body = bytearray()
        try:
            async for part in Request(scope, receive).stream():
                body += part if len(body) <= MAX_BODY_BYTES else b""  # the excess is read, and not kept in memory
            if len(body) > MAX_BODY_BYTES:
                told = f"The body has more than {MAX_BODY_BYTES:,} bytes. Send a smaller one."
                await _error(413, told)(scope, receive, send)
            else:
                await self._pass_on(bytes(body), scope, receive, send, exchange)
        except ClientDisconnect:
            exchange.leave()
        finally:
            if is_counted:
                logger.info("%s %s", scope["path"], exchange.summary)
                self._figures.update(cast(Any, exchange.figures))
                self._figures["resps_requests_in_progress"] -= 1

    async def _pass_on(self, body: bytes, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        async def departure() -> Message:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            exchange.leave()
            return message

        gone = asyncio.create_task(departure())
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.shield(gone)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                exchange.over.set()  # the ASGI server reports a disconnect also after a complete answer
            await send(message)

        try:
            await self._app(scope, replay, answer)
        finally:
            exchange.over.set()  # stop a call that still runs after its request
            gone.cancel()


_DROPPED = ("/v1/systemone", "/v1/audio/transcriptions", "/reset")  # routes for other models and for unloading


def build_app(models: AttachedModels) -> ASGIApp:
    """Make the ASGI application that serves `models`."""
    state, figures = models.generation_state, Counter(dict.fromkeys(list(_FIGURES)[1:], 0))
    app: FastAPI = server.build_server(
        models,
        ChatHandler(models, state),
        completion_handler=CompletionHandler(models, state),
        response_handler=ResponseHandler(models, state),
        transcription_handler=cast(Any, None),  # these routes are dropped
        systemone_handler=cast(Any, None),
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in _DROPPED]

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:  # async, to count in the event loop's thread only
        return PlainTextResponse(prometheus_text(figures))

    @app.exception_handler(StarletteHTTPException)
    def refused(request: Request, error: StarletteHTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def unread(request: Request, error: RequestValidationError) -> Response:
        return _error(400, f"The body is no JSON object ({error.errors()[0]['msg']}). See OpenAI's description of it.")

    return Door(app, figures)


# Functions of Transformers' server that this module calls or overrides -> their parameters in 5.25. A list that
# begins with dots names only the parameters used here.
RELIED_ON = {
    server.build_server: "model_manager chat_handler completion_handler response_handler transcription_handler "
    "systemone_handler enable_cors",
    EngineClient.__init__: "... model_id loader",
    EngineClient._send_request: "self method args streamer",
    EngineClient.generate_non_streaming: "self inputs generation_kwargs",
    EngineClient.generate_streaming: "self inputs generation_kwargs response_parser",
    ModelManager.__init__: "... model_timeout",
    ModelManager.get_engine: "self model",
    ModelManager.shutdown: "self",
    utils.Detokenizer.put_token: "self token_id",
    utils.BaseHandler.__init__: "self model_manager generation_state chat_template_kwargs",
    utils.BaseHandler._validate_request: "self body",
    utils.BaseHandler._check_prompt_length: "self engine inputs",
    utils.BaseHandler.get_processor_inputs_from_messages: "messages modality",
    utils.BaseHandler._build_generation_kwargs: "self body model_generation_config",
    **{
        getattr(handler, method): parameters
        for handler in (chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler)
        for method, parameters in {
            "handle_request": "self body request_id",
            "_streaming": "... request_id engine inputs generation_kwargs",
            "_non_streaming": "... request_id engine inputs generation_kwargs",
        }.items()
    },
}


def check_release() -> None:
    """Raise `ValueError` if functions of the installed Transformers have other parameters than in `RELIED_ON`."""
    for relied, parameters in RELIED_ON.items():
        taken, (first, *rest) = list(inspect.signature(relied).parameters), parameters.split()
        if not set(rest) <= set(taken) if first == "..." else taken != [first, *rest]:
            raise ValueError(
                f"The server of Transformers {transformers.__version__} is not one that `resps serve` knows: "
                f"`{relied.__qualname__}` takes ({' '.join(taken)}), not ({parameters}). Install Transformers 5.25."
            )
