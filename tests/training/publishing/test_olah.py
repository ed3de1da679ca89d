"""An existing mirror server, olah, serves a repository made from `model_cards/`: ours may share our errors."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest


HEAD = Path(__file__).parents[3] / "model_cards" / "smollm2-135m-instruct-head"
PULL = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig
from transformers_resps import DraftHead
from transformers_resps.hub import RepositoryFiles

local = DraftHead.from_pretrained(sys.argv[1])
for revision in (None, sys.argv[2]):  # a branch that may move, and the commit itself
    pulled = DraftHead.from_pretrained("tester/head", revision=revision)
    assert all(torch.equal(weight, pulled.state_dict()[name]) for name, weight in local.state_dict().items())
assert type(AutoConfig.from_pretrained("tester/head")).__name__ == "DraftHeadConfig"
files = RepositoryFiles("tester/head")
for file in Path(sys.argv[1]).rglob("*"):
    name = file.relative_to(sys.argv[1]).as_posix()
    assert file.is_dir() or files.fetch(name).read_bytes() == file.read_bytes(), name
assert files.commit == sys.argv[2] and files.fetch("nothing.json") is None
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(
        ["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def olah(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address of an olah that serves the head as `tester/head`, and the commit."""
    if find_spec("olah") is None or shutil.which("git") is None:
        pytest.skip("olah is not installed: pip install olah (or with --target FOLDER, and FOLDER in PYTHONPATH)")
    repository = tmp_path / "mirrors" / "models" / "tester" / "head"
    shutil.copytree(HEAD, repository)
    git(repository, "init", "--quiet")
    git(repository, "add", "--all", "--force")
    git(repository, "commit", "--quiet", "--message", "Publish")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path / "cache"}"\n'
        f'mirrors-path = ["{tmp_path / "mirrors"}"]\n[accessibility]\noffline = true\n'
    )
    command = [sys.executable, "-m", "olah.server", "--config", str(config), "--log-path", str(tmp_path / "logs")]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    said = []
    for line in server.stderr:  # ends when the server does
        said.append(line)
        if "Uvicorn running" in line:
            break
    assert server.poll() is None and said, "".join(said)
    yield f"http://127.0.0.1:{port}", git(repository, "rev-parse", "HEAD")
    server.terminate()
    server.communicate()


def test_a_head_is_pulled_whole_from_a_mirror_that_others_wrote(olah: tuple[str, str], tmp_path: Path) -> None:
    endpoint, commit = olah
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", PULL, HEAD, commit], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
