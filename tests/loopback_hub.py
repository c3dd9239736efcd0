"""A Hub on loopback: enough of its HTTP interface for the real client to push to and load from.

Small files are git blobs in commits; weights go through LFS (one part or several) or, where the
client uses xet, into a local content-addressed store that the real xet client writes and reads.
Faults are a list: the first one that fits a request strikes it and is used up.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_LoopbackSecretTokenThatMustNeverBePrinted"  # noqa: S105 - of this server only
PART_BYTES = 40_000
# Status, JSON or bytes, and headers.
Reply = tuple[int, Any, dict[str, str]]
Query = dict[str, list[str]]


@dataclass
class Fault:
    """Something that goes wrong with a request, after some that fit have passed.

    `path` is a regular expression, an empty `method` any. The status is answered; 0 drops the
    connection before anything is done, 1 after, and -9 kills the process `victim` of the hub.
    """

    method: str
    path: str
    status: int
    after: int = 0


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the SHA-256 of a large file."""

    content: bytes | None
    sha256: str | None = None
    size: int = 0

    @property
    def git_hash(self) -> str:
        """As git names the blob, or the pointer to it."""
        content = self.pointer if self.content is None else self.content
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()  # noqa: S324

    @property
    def pointer(self) -> bytes:
        """What git keeps of a large file."""
        return f"version https://git-lfs\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass
class Repository:
    """Commits, each a whole tree, and the references to them."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def add(self, reference: str, tree: dict[str, Blob]) -> str:
        """Commit a tree; its name."""
        text = f"{reference}{len(self.commits)}{sorted((n, b.git_hash) for n, b in tree.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324
        self.commits[commit], self.references[reference] = tree, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a reference or itself."""
        return revision if revision in self.commits else self.references.get(revision)


class LoopbackHub:
    """The server's state, and what it was asked."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.xet_hashes: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.multipart = False
        self.victim: int | None = None
        self.lock = threading.Lock()
        self.url = ""

    def tree(self, repository: str, revision: str = "main") -> dict[str, Blob]:
        """The files of a revision."""
        found = self.repositories[repository]
        return found.commits[found.resolve(revision) or ""]

    def content(self, repository: str, name: str, revision: str = "main") -> bytes:
        """The bytes of a file."""
        blob = self.tree(repository, revision)[name]
        return blob.content if blob.content is not None else self.objects[str(blob.sha256)]

    def create(self, repository: str, files: dict[str, bytes]) -> str:
        """A repository as somebody else would have made it; `.safetensors` are large files."""
        made = self.repositories[repository] = Repository(private=False)
        tree = {name: Blob(content) for name, content in files.items()}
        for name in (name for name in files if name.endswith(".safetensors")):
            digest = hashlib.sha256(files[name]).hexdigest()
            self.objects[digest] = files[name]
            tree[name] = Blob(None, digest, len(files[name]))
        return made.add("main", tree)

    def asked(self, method: str, pattern: str) -> int:
        """How many requests of a kind there were."""
        return sum(m == method and re.search(pattern, p) is not None for m, p in self.requests)

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault that strikes this request, if one does."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method in ("", method) and re.search(fault.path, path):
                    fault.after -= 1
                    if fault.after >= 0:
                        return None
                    self.faults.remove(fault)
                    return fault
        return None


@contextmanager
def serving(store: Path) -> Iterator[LoopbackHub]:
    """A hub that listens on loopback while the context lasts."""
    hub = LoopbackHub(store)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        method, split = self.command, urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.strike(method, path)
        if fault is not None and fault.status in (-9, 0):
            if fault.status:
                os.kill(self.hub.victim or 0, signal.SIGKILL)
            self._drop()
        elif fault is not None and fault.status > 1:
            headers = {"Retry-After": "0"} if fault.status == 429 else {}
            self._send(fault.status, {"error": f"fault {fault.status}"}, headers)
        else:
            with self.hub.lock:
                reply = self._route(method, path, query, body)
            if fault is not None:
                self._drop()
            else:
                self._send(*reply)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - named by http.server

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, value: Any, headers: dict[str, str]) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, method: str, path: str, query: Query, body: bytes) -> Reply:
        # Data sets stand in another branch of the same pages.
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        if path in ("/api/agent-harnesses", "/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []} if "yaml" in path else {}, {}
        # Addresses of objects are signed by themselves, so to say.
        signed = path.startswith("/objects/")
        if method == "POST" and not signed and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "log in first"}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/objects/(\w+)(?:/(\d+))?", path):
            return self._object(method, found[1], found[2], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, self._batch(json.loads(body)), {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._model(found[1], found[2] or "", query, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3])
        return 404, {"error": f"no such page: {path}"}, {}

    def _create(self, wanted: dict[str, Any]) -> Reply:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            return 409, {"error": "it exists", "url": f"{self.hub.url}/{name}"}, {}
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        made = self.hub.repositories[name] = Repository(private)
        made.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for item in wanted["objects"]:
            href = f"{self.hub.url}/objects/{item['oid']}"
            if item["oid"] in self.hub.objects:
                objects.append(item)
                continue
            header = {}
            if self.hub.multipart:
                count = -(-item["size"] // PART_BYTES)
                header = {"chunk_size": str(PART_BYTES)}
                header |= {str(part): f"{href}/{part}" for part in range(1, count + 1)}
            actions = {"upload": {"href": href, "header": header}}
            objects.append({**item, "actions": actions})
        return {"transfer": "multipart" if self.hub.multipart else "basic", "objects": objects}

    def _object(self, method: str, oid: str, part: str | None, body: bytes) -> Reply:
        if method == "PUT" and part is not None:
            self.hub.parts[oid, int(part)] = body
            return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}  # noqa: S324
        if method == "POST":
            numbers = [entry["partNumber"] for entry in json.loads(body)["parts"]]
            body = b"".join(self.hub.parts[oid, number] for number in numbers)
        if method in ("GET", "HEAD"):
            return self._bytes(self.hub.objects[oid], {})
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "these are other bytes"}, {}
        self.hub.objects[oid] = body
        return 200, {}, {}

    def _model(self, name: str, rest: str, query: Query, body: bytes) -> Reply:
        if (repository := self.hub.repositories.get(name)) is None:
            return _none("repository", "RepoNotFound")
        verb, _, argument = rest.partition("/")
        if verb in ("", "revision", "tree"):
            if (commit := repository.resolve(argument or "main")) is None:
                return _none("revision", "RevisionNotFound")
            if verb == "tree":
                return 200, [_entry(n, b) for n, b in repository.commits[commit].items()], {}
            files = [_entry(n, b) for n, b in repository.commits[commit].items()]
            siblings = [{"rfilename": file["path"], "size": file["size"]} for file in files]
            about = {"id": name, "sha": commit, "private": repository.private}
            return 200, about | {"siblings": siblings}, {}
        if verb == "branch":
            if argument in repository.references:
                return 409, {"error": "it exists"}, {}
            repository.references[argument] = repository.references["main"]
            return 200, {}, {}
        if verb == "discussions":
            found = repository.pull_requests
            return 200, {"discussions": found, "count": len(found), "start": 0}, {}
        if verb.startswith("xet-"):
            return self._xet_token()
        if verb == "preupload":
            return self._preupload(repository, argument, json.loads(body))
        if verb == "commit":
            return self._commit(name, repository, argument, query, body)
        return 404, {"error": f"no such page: {rest}"}, {}

    def _xet_token(self) -> Reply:
        address, expires = f"local://{self.hub.store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet"}
        headers["X-Xet-Token-Expiration"] = str(expires)
        return 200, {"casUrl": address, "accessToken": "xet", "exp": expires}, headers

    def _preupload(self, repository: Repository, revision: str, wanted: dict[str, Any]) -> Reply:
        tree, files = repository.commits[repository.resolve(revision) or ""], []
        for path in (item["path"] for item in wanted["files"]):
            blob = tree.get(path)
            oid = None if blob is None else blob.sha256 or blob.git_hash
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def _commit(
        self, name: str, repository: Repository, revision: str, query: Query, body: bytes
    ) -> Reply:
        head = repository.resolve(revision)
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if head is None or (parent and parent != head):
            return 412, {"error": "the branch has moved on"}, {}
        tree = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                oid = value["oid"]
                if oid not in self.hub.objects and oid not in self.hub.xet_hashes:
                    return 400, {"error": f"nothing was uploaded for {value['path']}"}, {}
                tree[value["path"]] = Blob(None, oid, value["size"])
            else:
                del tree[value["path"]]
        repository.messages.append(lines[0]["value"]["summary"])
        reference, address = revision, None
        if "create_pr" in query:
            number = len(repository.pull_requests) + 1
            reference = f"refs/pr/{number}"
            address = f"{self.hub.url}/{name}/discussions/{number}"
            opened: dict[str, Any] = {"title": repository.messages[-1], "num": number}
            opened |= {"status": "open", "isPullRequest": True, "author": {"name": "me"}}
            opened |= {"createdAt": "2027-01-01T00:00:00.000Z"}
            repository.pull_requests.append(opened | {"repo": {"name": name, "type": "model"}})
        commit = repository.add(reference, tree)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return 200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": address}, {}

    def _resolve(self, name: str, revision: str, file: str) -> Reply:
        if (repository := self.hub.repositories.get(name)) is None:
            return _none("repository", "RepoNotFound")
        if (commit := repository.resolve(revision)) is None:
            return _none("revision", "RevisionNotFound")
        blob = repository.commits[commit].get(file)
        if blob is None:
            return _none("file", "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.sha256 or blob.git_hash}"'}
        if blob.content is not None:
            return self._bytes(blob.content, headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if found := self.hub.xet_hashes.get(str(blob.sha256)):
            route = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": found, "X-Xet-Refresh-Route": route}
            return self._bytes(b"", headers)
        return self._bytes(self.hub.objects[str(blob.sha256)], headers)

    def _bytes(self, content: bytes, headers: dict[str, str]) -> Reply:
        """A file, or the rest of it that the client asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return 200, content, headers
        start = int(asked[1])
        told = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return 206, content[start:], headers | told


def _none(what: str, code: str, headers: dict[str, str] | None = None) -> Reply:
    return 404, {"error": f"no such {what}"}, {"X-Error-Code": code, **(headers or {})}


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    size = blob.size if blob.content is None else len(blob.content)
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob.git_hash, "size": size}
    if blob.content is None:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry
