"""A small Hub on this machine: the part of its HTTP interface that huggingface_hub uses for models.

Repositories, commits and branches; downloads with ETags and commit headers; uploads through preupload, LFS and commit;
tokens, private and gated repositories; and faults on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_tests"


@dataclass
class Repo:
    """A repository.

    Attributes:
        private: Whether it takes a token to see it.
        gated: Whether nobody has access yet.
        commits: Files of every commit, by its id.
        refs: Commit of every branch and tag.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", without: Collection[str] = ()) -> str:
        """Add files to a branch, and take others away; gives the commit."""
        base = self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {})
        content = {**{name: data for name, data in base.items() if name not in without}, **files}
        digest = hashlib.sha1()
        for name, data in sorted(content.items()):
            digest.update(name.encode() + b"\0" + data)
        digest.update(f"{branch} {len(self.commits)}".encode())
        oid = digest.hexdigest()
        self.commits[oid] = content
        self.refs[branch] = oid
        return oid


class HubServer:
    """The server; a context manager that serves on a free port of the loopback interface.

    Attributes:
        repos: All repositories.
        faults: What to do to downloads of a file: ``truncate``, ``corrupt``, ``error``, ``forbid``.
        after: What happens once, when a file has been downloaded.
        requests: Method and path of every request.
        objects: Contents uploaded through LFS, by SHA-256.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, str] = {}
        self.after: dict[str, Callable[[], object]] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """Forget everything."""
        for state in (self.repos, self.faults, self.after, self.requests, self.objects):
            state.clear()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    # ------------------------------------------------------------------ answers

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def token(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") if given else None

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def repo_or_refuse(self, name: str) -> Repo | None:
        token = self.token()
        repo = self.server_state.repos.get(name)
        if token is not None and token != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token is None):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    # ------------------------------------------------------------------ requests

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_state.requests.append(f"{self.command} {path}")
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                getattr(self, method)(*match.groups())
                return
        self.body()
        self.refuse(404, "", f"no such page: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def whoami(self) -> None:
        if self.token() != TOKEN:
            self.refuse(401, "", "Invalid user token")
        else:
            self.answer(200, {"type": "user", "name": "somebody", "orgs": [{"name": "some-org"}]})

    def resolve(self, name: str, revision: str, filename: str) -> None:
        repo = self.repo_or_refuse(name)
        if repo is None:
            return
        if repo.gated:
            self.refuse(403 if self.token() else 401, "GatedRepo", "Access to this model is restricted")
            return
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        data = repo.commits[oid].get(filename)
        if data is None:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        fault = self.server_state.faults.get(filename)
        if fault == "forbid":
            self.refuse(403, "", "Not from this network")
            return
        if fault == "error":
            self.refuse(500, "", "Internal error")
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if self.command == "GET" and fault == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "GET" and fault == "truncate":
            self.send_response(200)
            for header, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command == "GET" and first:
            start = int(first[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[start:], headers)
            return
        if self.command == "GET":
            self.server_state.after.pop(filename, lambda: None)()  # before the client has all of it, and asks for more
        self.answer(200, data, headers)

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo_or_refuse(name)
        if repo is None:
            return
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings = [{"rfilename": file} for file in repo.commits[oid]]
        self.answer(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo_or_refuse(name)
        if repo is None:
            return
        files = repo.commits[repo.refs.get(revision, revision)]
        entries = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()]
        self.answer(200, entries)

    def create(self) -> None:
        wanted = json.loads(self.body())
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if self.token() != TOKEN:
            self.refuse(401, "", "Invalid username or password.")
        elif name in self.server_state.repos:
            self.answer(409, {"error": "You already created this model repo", "url": self.url(name)})
        else:
            repo = self.server_state.repos[name] = Repo(
                private=wanted.get("private") or wanted.get("visibility") == "private"
            )
            repo.commit({".gitattributes": b""})
            self.answer(200, {"url": self.url(name), "id": name})

    def url(self, name: str) -> str:
        return f"{self.server_state.endpoint}/{name}"

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        if self.repo_or_refuse(name) is not None:
            self.answer(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        wanted = json.loads(self.body())["objects"]
        if self.repo_or_refuse(name) is None:
            return
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server_state.endpoint}/lfs/{o['oid']}", "header": {}}}}
            for o in wanted
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "", "digest does not match")
            return
        self.server_state.objects[oid] = data
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo_or_refuse(name)
        if repo is None:
            return
        files, deleted = {}, set()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server_state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.add(value["path"])
        oid = repo.commit(files, revision, deleted)
        url = f"{self.url(name)}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def validate_yaml(self) -> None:
        self.body()
        self.answer(200, {"errors": [], "warnings": []})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"/api/models/{_NAME}", "info"),
    (rf"/api/models/{_NAME}/revision/(.+)", "info"),
    (rf"/api/models/{_NAME}/tree/([^/]+)", "tree"),
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (rf"/api/models/{_NAME}/preupload/(.+)", "preupload"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/lfs/([0-9a-f]{64})", "lfs_put"),
    (rf"/api/models/{_NAME}/commit/(.+)", "commit"),
    (r"/api/validate-yaml", "validate_yaml"),
)
