"""A Hugging Face Hub on 127.0.0.1: just enough for the real `huggingface_hub` client, plus faults.

    with HubServer() as hub:
        hub.add("owner/name", "0" * 40, {"cfg.json": Path("cfg.json")})
        hub.faults.append(Fault("cfg.json", "status", at=503))
        hf_hub_download("owner/name", "cfg.json", revision="0" * 40, cache_dir=…, endpoint=hub.url)

`cdn` names a second server to which large files are redirected, `private` and `gated` repositories want a token.
What it does not have: Xet, compression, uploads.
"""

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?:models/)?(?P<repo>.+?)"  # a data set keeps its "datasets/" here, as in RESOLVE
    r"(?:/(?P<verb>revision|tree)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?"
)


class Request(NamedTuple):
    """One request as received; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Fault:
    """How one file misbehaves the next `times` times it is asked for (`None`: every time).

    `at`: how many bytes come before a drop (FIN), reset (RST) or stall; the byte to flip; the status code; the
    Content-Length that is too short, and that the body then has; bytes that the Content-Length is too long; bytes that
    trickle every 20 ms. `etag` answers with the ETag of other content, `whole` ignores a Range.
    `method` limits a status, missing, etag or short fault; the others are for GET in any case.
    """

    file: str
    kind: Literal["drop", "reset", "stall", "flip", "status", "missing", "short", "long", "trickle", "etag", "whole"]
    at: int = 0
    times: int | None = 1
    method: Literal["GET", "HEAD"] | None = None
    retry_after: int | None = None
    """Seconds, said with a status."""
    message: str | None = None
    """The hub's X-Error-Message, said with a status."""


def is_lfs(path: Path) -> bool:
    """Whether the hub keeps such a file in LFS (by suffix, or because it exceeds git's 10 MB)."""
    return path.suffix in (".safetensors", ".pt", ".bin") or path.stat().st_size > 10_000_000


def etag_of(path: Path) -> str:
    """The hub's ETag: sha256 of an LFS file, git's blob id (sha1) of any other."""
    content = path.read_bytes()
    digest = hashlib.sha256(content) if is_lfs(path) else hashlib.sha1(b"blob %d\0%b" % (len(content), content))
    return digest.hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; `url` is the endpoint, `requests` what was asked, `faults` what goes wrong next."""

    request_queue_size = 128  # or a busy machine drops connections that no fault has asked to be dropped

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.served = 0
        """Faults so far."""
        self.stopped = threading.Event()
        self._commits: dict[tuple[str, str], dict[str, Path]] = {}
        self._refs: dict[tuple[str, str], str] = {}
        self.etags: dict[Path, str] = {}
        self.private: dict[str, str] = {}
        """Repository -> the token that it wants; without one it does not exist."""
        self.gated: dict[str, str] = {}
        """The same, but strangers are told that it exists."""
        self.cdn: HubServer | None = None
        self._lock = threading.Lock()

    def add(self, repo_id: str, revision: str, files: Mapping[str, Path], *, ref: str = "main") -> None:
        """Publish `files` as a commit and point `ref` to it; a data set's id begins with "datasets/"."""
        self.etags |= {path: etag_of(path) for path in files.values()}
        self._commits[repo_id, revision] = dict(files)
        self._refs[repo_id, ref] = revision

    def tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, Path]]:
        """(commit, its files); a `LookupError` carries the hub's error code."""
        if all(repo_id != known for known, _ in self._commits):
            raise LookupError("RepoNotFound")
        commit = self._refs.get((repo_id, revision), revision)
        if (repo_id, commit) not in self._commits:
            raise LookupError("RevisionNotFound")
        return commit, self._commits[repo_id, commit]

    def share(self, other: "HubServer") -> None:
        """Serve what `other` has, and be its CDN."""
        self._commits, self._refs, self.etags, other.cdn = other._commits, other._refs, other.etags, self

    def take_fault(self, method: str, file: str) -> Fault | None:
        """The first fault in force for this request, used up by one."""
        with self._lock:
            for fault in self.faults:
                only = fault.method or (None if fault.kind in ("status", "missing", "etag") else "GET")
                if fault.file == file and fault.times != 0 and only in (None, method):
                    fault.times = None if fault.times is None else fault.times - 1
                    self.served += 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients hang up without a traceback on stderr."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        self.hub = cast(HubServer, self.server)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.path, headers))
        path = urlsplit(self.path).path
        try:
            if match := API.fullmatch(path):
                revision = unquote(match["rev"] or "main")
                self._api(match["repo"], revision, match["verb"], unquote(match["path"] or ""))
            elif match := RESOLVE.fullmatch(path):
                self._resolve(match["repo"], unquote(match["rev"]), unquote(match["path"]))
            else:
                raise LookupError("RepoNotFound")
        except LookupError as missing:
            # The hub does not tell strangers a missing repository from a private one: both are 401.
            status = 401 if str(missing) == "RepoNotFound" else 404
            self._answer(status, {"X-Error-Code": str(missing)})

    do_HEAD = do_GET

    def _answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        # One request per connection: none stays open to be served after the server has stopped.
        for name, value in {"Connection": "close", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _api(self, repo: str, revision: str, verb: str | None, folder: str) -> None:
        commit, files = self.hub.tree(repo, revision)
        below = {name: path for name, path in files.items() if not folder or name.startswith(folder + "/")}
        if not below:
            raise LookupError("EntryNotFound")
        answer: object = {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": []}
        if verb == "tree":
            rows = ((name, path.stat().st_size, self.hub.etags[path]) for name, path in below.items())
            answer = [{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in rows]
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _refused(self, repo: str) -> bool:
        """Whether the request lacked the token, and has been answered."""
        header = self.headers.get("Authorization")
        if repo in self.hub.private and header != f"Bearer {self.hub.private[repo]}":
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
        elif repo in self.hub.gated and header != f"Bearer {self.hub.gated[repo]}":
            self._answer(401 if header is None else 403, {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if self._refused(repo):
            return None
        commit, files = self.hub.tree(repo, revision)
        fault = self.hub.take_fault(self.command, name)
        found = {"X-Repo-Commit": commit}
        if fault and fault.kind == "status":
            said = {"Retry-After": fault.retry_after, "X-Error-Message": fault.message}
            return self._answer(fault.at, {name: str(value) for name, value in said.items() if value is not None})
        if name not in files or (fault and fault.kind == "missing"):
            # With the commit in the answer the client remembers the absence (`.no_exist` in its cache).
            return self._answer(404, found | {"X-Error-Code": "EntryNotFound"})
        path = files[name]
        tag, size = self.hub.etags[path], path.stat().st_size
        if fault and fault.kind == "etag":
            tag = hashlib.sha256(tag.encode()).hexdigest()[: len(tag)]
        etag = f'"{tag}"'
        found |= {"ETag": etag, "Accept-Ranges": "bytes"}
        if is_lfs(path):
            found |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
            if self.hub.cdn is not None:
                return self._answer(302, found | {"Location": f"{self.hub.cdn.url}{self.path}?Signature=sesame"})
        rest = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))  # the only form the client sends
        if fault and fault.kind == "whole":
            rest = None
        start = int(rest[1]) if rest else 0
        if start > size:
            return self._answer(416, found)
        found |= {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if rest else {}
        length = size - start
        if fault and fault.kind == "short":
            length = max(0, fault.at - start)
        if fault and fault.kind == "long":
            length += fault.at
        self._answer(206 if rest else 200, found | {"Content-Length": str(length)})
        if self.command == "GET":
            self._send(path, start, fault)

    def _send(self, path: Path, start: int, fault: Fault | None) -> None:
        content = path.read_bytes()
        if fault and fault.kind == "flip":
            content = content[: fault.at] + bytes([content[fault.at] ^ 1]) + content[fault.at + 1 :]
        stop = fault.at if fault and fault.kind in ("drop", "reset", "stall", "short") else len(content)
        pace = fault.at if fault and fault.kind == "trickle" else len(content) + 1
        for piece in range(start, max(stop, start), pace):
            self.wfile.write(memoryview(content)[piece : min(piece + pace, stop)])
            if fault and fault.kind == "trickle":
                time.sleep(0.02)
        if fault and fault.kind == "stall":
            self.hub.stopped.wait()
        if fault and fault.kind == "reset":
            # Closing with a linger of zero seconds sends RST where a plain close sends FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
