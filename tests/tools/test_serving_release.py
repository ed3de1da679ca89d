"""The private classes of Transformers' server on which `resps serve` stands, on each supported release."""

import inspect

import pytest


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the extra `serve` is not installed")

from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

from transformers_resps.tools import serving


def test_the_installed_release_is_known() -> None:
    serving.check_release()


def test_a_release_with_another_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving.RELIED_ON, utils.GenerateManager.submit, "self job")
    with pytest.raises(ValueError, match=r"`GenerateManager.submit` takes \(self fn args kwargs\), not \(self job\)"):
        serving.check_release()


def test_everything_that_our_classes_override_is_pinned() -> None:
    pairs = {
        serving.OneAtATime: utils.GenerateManager,
        serving.OneManager: utils.GenerationState,
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
            if inspect.isfunction(found) and name not in ("list_models", "get_gen_models"):  # one of them per release
                assert found in pinned or any(name in method.__qualname__ for method in pinned), found


def test_stock_still_calls_what_is_replaced() -> None:
    source = inspect.getsource(utils.GenerateManager)
    assert "model.generate(**gen_kwargs)" in source and "model.generate, **generate_kwargs" in source
    for handler in (chat_completion, completion, response):
        text = inspect.getsource(handler)
        calls = ("self._validate_request(body)", "self._resolve_model(body)", "self._build_generation_config(body, ")
        assert all(call in text for call in calls), handler.__name__
        assert "generation_state.get_manager(model_id" in text
    assert 'data: {{"error": ' in inspect.getsource(chat_completion) and 'data: {{"error": ' in inspect.getsource(
        completion
    )
    assert "model_manager.shutdown()" in inspect.getsource(server)
