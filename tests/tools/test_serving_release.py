"""The private classes of Transformers' server on which `resps serve` stands."""

import inspect

import pytest


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("transformers", minversion="5.25", reason="the extra `serve` needs Transformers 5.25")

from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

from transformers_resps.tools import serving


def test_the_installed_release_is_known() -> None:
    serving.check_release()


def test_a_release_with_another_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving.RELIED_ON, utils.Detokenizer.put_token, "self job")
    with pytest.raises(ValueError, match=r"`Detokenizer.put_token` takes \(self token_id\), not \(self job\)"):
        serving.check_release()


def test_everything_that_our_classes_override_is_pinned() -> None:
    pairs = {
        serving.AttachedEngine: model_manager.EngineClient,
        serving.AttachedModels: model_manager.ModelManager,
        serving.ChatHandler: chat_completion.ChatCompletionHandler,
        serving.CompletionHandler: completion.CompletionHandler,
        serving.ResponseHandler: response.ResponseHandler,
    }
    pinned = set(serving.RELIED_ON)
    for own, stock in pairs.items():
        written = {name for kind in own.__mro__ if kind.__module__ == serving.__name__ for name in vars(kind)}
        for name in written & set(dir(stock)):
            found = getattr(stock, name)
            if inspect.isfunction(found) and name != "list_models":
                assert found in pinned or any(name in method.__qualname__ for method in pinned), found


def test_stock_still_calls_what_is_replaced() -> None:
    engine = inspect.getsource(model_manager.EngineClient)
    assert 'self._send_request("generate", args=(dict(inputs), generation_kwargs))' in engine
    assert "self._send_request(method, args=args, streamer=streamer)" in engine
    for handler in (chat_completion, completion, response):
        text = inspect.getsource(handler)
        calls = ("self._validate_request(body)", 'self.model_manager.get_engine(body.get("model"))')
        calls += ("self._build_generation_kwargs(body, engine.", "self._check_prompt_length(engine, inputs)")
        assert all(call in text for call in calls), handler.__name__
        assert "engine.generate_streaming(inputs, generation_kwargs" in text
    assert "data: {json.dumps({'error': item.msg})}" in inspect.getsource(chat_completion)
    assert "data: {json.dumps({'error': text.msg})}" in inspect.getsource(completion)
    assert "model_manager.shutdown()" in inspect.getsource(server)
