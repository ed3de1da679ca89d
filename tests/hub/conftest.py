from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import dynamic_module_utils
from transformers.utils import hub as transformers_hub

from tests.hub.loopback_hub import TOKEN, LoopbackHub
from tests.training.publishing.artefacts import copy, head_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on loopback with nothing in it; this process talks to it, with a token, and has an empty cache.

    `HF_ENDPOINT` and its like are read when huggingface_hub is imported, so what they set is set here; the journey of
    test_loopback_journey.py takes the environment, in a process of its own.
    """
    server = LoopbackHub()
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for module in (dynamic_module_utils, transformers_hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that huggingface_hub would have waited before another try."""
    asked: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", asked.append)
    return asked


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that lacks nothing; copy it before you change it."""
    return head_folder(tmp_path_factory.mktemp("made") / "head")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pristine head."""
    return copy(pristine, tmp_path / "head")
