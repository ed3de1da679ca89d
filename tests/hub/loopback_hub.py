"""A Hub on loopback: the upload and download calls of the installed `huggingface_hub`, and faults on demand.

Plain HTTP only: no Xet. Large files (safetensors) go through Git LFS, the others with the commit.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_the_tests"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, branches by their name."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        seed = repr((len(self.commits), sorted(files))).encode()
        oid = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """What to do to requests whose method and path match, `times` times.

    `answer` is a status with headers, or "drop", "truncate" or "corrupt" the body.
    """

    pattern: str
    answer: tuple[int, dict[str, str]] | str
    times: int = 1


class LoopbackHub:
    """Runs in a thread; its state may be read and changed between requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.corrupted_byte = 0
        self.before: Callable[[str], None] = lambda request: None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.elsewhere = f"http://localhost:{self._server.server_port}"  # another host, as large files have
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, pattern: str, answer: tuple[int, dict[str, str]] | str | int, times: int = 1) -> None:
        self.faults.append(Fault(pattern, (answer, {}) if isinstance(answer, int) else answer, times))

    def take_fault(self, request: str) -> tuple[int, dict[str, str]] | str | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.answer
        return None


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    """One request. Routes are methods; each gets the match of its path."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    _routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/branch/(?P<branch>.+)", "branch"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>.+)", "preupload"),
        ("POST", r"/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>.+)", "commit"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<rev>.+))?", "info"),
        ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>\w+)", "store"),
        ("GET", r"/large/(?P<oid>\w+)", "give"),
        ("GET", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)", "file"),
    )

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.hub.before(request)
        self.how = self.hub.take_fault(request)
        if self.how == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(self.how, tuple):
            self._json({"error": "as the test asked"}, self.how[0], self.how[1])
            return
        for verb, pattern, name in self._routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                getattr(self, f"_{name}")(**{k: v for k, v in match.groupdict().items()})
                return
        self._json({"error": f"no such call: {request}"}, 404)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.how == "truncate":
            content, self.close_connection = content[: len(content) // 2], True
        elif self.how == "corrupt":
            damaged = bytearray(content)
            damaged[self.hub.corrupted_byte] ^= 1
            content = bytes(damaged)
        self.wfile.write(content)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid username or password."}, 401)
        return False

    def _found(self, id: str, rev: str | None) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(id)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.resolve(rev or "main")
        if commit is None:
            self._json({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def _create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'tester'}/{asked['name']}"
        if repo_id in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo_id}"}, 409)
            return
        self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _branch(self, id: str, branch: str) -> None:
        repository = self.hub.repositories[id]
        if branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def _info(self, id: str, rev: str | None = None, **_: Any) -> None:
        if found := self._found(id, rev):
            repository, commit = found
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            self._json({"id": id, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings})

    def _tree(self, id: str, rev: str) -> None:
        if found := self._found(id, rev):
            repository, commit = found
            self._json([self._entry(*item) for item in repository.commits[commit].items()])

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return entry

    def _preupload(self, id: str, rev: str) -> None:
        if self._may_write():
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {name: "lfs" if is_large(name) else "regular" for name in names}
            self._json({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]})

    def _batch(self, id: str) -> None:
        if self._may_write():
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{o['oid']}"}}}
                for o in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        whole = hashlib.sha256(self.body).hexdigest() == oid
        if whole:
            self.hub.large[oid] = self.body
        self._json({}, 200 if whole else 400)

    def _give(self, oid: str) -> None:
        assert "Authorization" not in self.headers, "the token went to another host"
        self._send(self.hub.large[oid], 200, {"ETag": f'"{oid}"'})

    def _commit(self, id: str, rev: str) -> None:
        found = self._found(id, rev) if self._may_write() else None
        if not found:
            return
        repository, parent = found
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header" and value.get("parentCommit", parent) != parent:
                self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, rev)
        self._json({"commitUrl": f"{self.hub.endpoint}/{id}/commit/{oid}", "commitOid": oid})

    def _file(self, id: str, rev: str, name: str) -> None:
        found = self._found(id, rev)
        if not found:
            return
        repository, commit = found
        content = repository.commits[commit].get(name)
        seen = {"X-Repo-Commit": commit}
        if content is None:
            self._json({"error": "Entry not found"}, 404, {**seen, "X-Error-Code": "EntryNotFound"})
        elif is_large(name):
            oid = hashlib.sha256(content).hexdigest()
            self.hub.large[oid] = content
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._send(b"", 302, {**seen, **linked, "Location": f"{self.hub.elsewhere}/large/{oid}"})
        else:
            self._send(content, 200, {**seen, "ETag": f'"{git_sha1(content)}"'})
