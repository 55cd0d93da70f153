# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback address that speaks the protocol as `huggingface_hub` uses it, with one user, "user".

Repositories are created, files announced (preupload), large ones sent through LFS, and committed; they are resolved by
branch or commit, with etags. What this leaves out: everything that models, adapters and their cards do not need.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


TOKEN = "hf_owner"
LARGE = (".safetensors", ".bin", ".png", ".onnx")  # by name, as the real one's .gitattributes


@dataclass
class Repository:
    """A repository: commits by id, each the whole of its files, and branches that point at them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{branch}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Refusal(Exception):
    """An answer with an error status and the Hub's code for it."""

    def __init__(self, status: int, code: str, message: str, **answer: str):
        super().__init__(message)
        self.status, self.code, self.answer = status, code, {"error": message, **answer}


class Hub(ThreadingHTTPServer):
    """The server and what it stores. `on_large_file` is called when the bytes of a large file arrive."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.on_large_file: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a hub for the duration of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


REPOSITORY = r"(?P<repo>[^/]+/[^/.]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
        ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<branch>[^/]+)", "branch"),
        ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in self.ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    getattr(self, f"_{name}")(body, **match.groupdict())
                    return
            raise Refusal(404, "NotFound", f"{method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self._send(refusal.status, json.dumps(refusal.answer).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *args) -> None:
        pass

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: dict | list) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, writes: bool = False) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._is_owner):
            raise Refusal(404 if self._is_owner else 401, "RepoNotFound", "Repository not found")
        if writes and not self._is_owner:
            raise Refusal(403, "Forbidden", "You don't have the rights to write here")
        return repository

    def _whoami(self, body: bytes) -> None:
        if not self._is_owner:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        self._send_json({"type": "user", "name": "user", "orgs": []})

    def _validate_yaml(self, body: bytes) -> None:
        self._send_json({"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        if not self._is_owner:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.server.repositories:
            raise Refusal(409, "Conflict", "You already created this model repo", url=f"{self.server.url}/{name}")
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self._send_json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._repository(repo, writes=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        self._repository(repo, writes=True)
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.server.large_files
            actions = {} if known else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append({**item, **actions})
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        self.server.on_large_file()
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "BadRequest", "These bytes have another hash")
        self.server.large_files[oid] = body
        self._send(200)

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo, writes=True)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.commits[repository.branches[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, "BadRequest", "A large file was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(revision, files)
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        repository = self._repository(repo, writes=True)
        if branch in repository.branches:
            raise Refusal(409, "Conflict", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send_json({})

    def _found(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo)
        sha = repository.find(revision or "main")
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        sha, files = self._found(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self._send_json({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self._found(repo, revision)
        self._send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
                if path.startswith(f"{folder}/" if folder else "")
            ]
        )

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, files = self._found(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if path.endswith(LARGE):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        self._send(200, content, headers)
