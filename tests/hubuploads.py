"""A Hugging Face Hub on 127.0.0.1 that takes uploads: as much of it as `huggingface_hub.HfApi` needs, without Xet.

    with UploadServer(folder) as hub:
        HfApi(endpoint=hub.url, token=WRITER).create_repo("me/saes")

The client uses Xet wherever `hf_xet` is installed, whatever the server says: HF_HUB_DISABLE_XET=1 makes it use LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

import yaml
from hubserver import HubServer, Request, _Handler, is_lfs

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write to repositories of `me`, the other to none."""


class UploadServer(HubServer):
    """`HubServer` whose repositories are made and written by its clients. `hidden`: those made private."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.RequestHandlerClass = _UploadHandler
        self.folder = folder
        self.hidden: set[str] = set()
        self.repositories: dict[str, list[str]] = {}
        """Repository -> its commits' messages."""
        self.broken_uploads = 0
        """So many PUTs of large files are answered with an error."""
        self.refused: str | None = None
        """The end of a path: POSTs to it are answered with an error."""

    def __enter__(self) -> UploadServer:
        super().__enter__()
        return self

    def create(self, repo: str, private: bool) -> None:
        """An empty repository."""
        self.repositories[repo] = []
        self.hidden |= {repo} if private else set()
        self.add(repo, "0" * 40, {})

    def files(self, repo: str, revision: str = "main") -> dict[str, Path]:
        """Path -> file at a commit."""
        return self.tree(repo, revision)[1]

    def commit(self, repo: str, message: str, changes: dict[str, Path]) -> str:
        """Add a commit on top; its id."""
        revision = hashlib.sha1(f"{repo} {len(self.repositories[repo])} {message}".encode()).hexdigest()
        self.add(repo, revision, self.files(repo) | changes)
        self.repositories[repo].append(message)
        return revision

    def store(self, content: bytes) -> Path:
        """A file of this content; its name is its SHA-256."""
        path = self.folder / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path


class _UploadHandler(_Handler):
    hub: UploadServer

    def _tell(self, answer: object, status: int = 200) -> None:
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _api(self, repo: str, revision: str, verb: str | None, folder: str) -> None:
        commit, files = self.hub.tree(repo, revision)
        if verb != "tree":
            return self._tell({"id": repo, "sha": commit, "private": repo in self.hub.hidden, "siblings": []})
        self._tell([self._row(name, path) for name, path in files.items()])

    def _row(self, name: str, path: Path) -> dict[str, Any]:
        size, etag = path.stat().st_size, self.hub.etags[path]
        row: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": etag}
        if len(etag) == 64:  # the hub's `oid` of a large file is that of its pointer
            row |= {"oid": "f" * 40, "lfs": {"oid": etag, "size": size, "pointerSize": 130}}
        return row

    def do_POST(self) -> None:
        body = self._read()
        if self.hub.refused is not None and self.path.endswith(self.hub.refused):
            return self._tell({"error": "not today", "errors": [{"message": "not today"}]}, 400)
        if self.path.startswith("/api/validate-yaml"):
            return self._validate(json.loads(body)["content"])
        if not self._may_write():
            return
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            return self._preupload(match[1], json.loads(body)["files"])
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            return self._batch(json.loads(body)["objects"])
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        self._answer(404)

    def do_PUT(self) -> None:
        body = self._read()
        if self.hub.broken_uploads:
            self.hub.broken_uploads -= 1
            return self._answer(418)  # not one of the codes that the client tries again
        assert hashlib.sha256(body).hexdigest() == self.path.rsplit("/", 1)[1]
        self.hub.store(body)
        self._answer(200)

    def _read(self) -> bytes:
        self.hub = cast(UploadServer, self.server)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.path, headers))
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == WRITER:
            return True
        self._tell({"error": "no"}, 403 if token == READER else 401)
        return False

    def _validate(self, content: str) -> None:
        front = yaml.safe_load(content.split("---\n")[1])
        wrong = not isinstance(front, dict) or "library_name" not in front
        self._tell({"errors": [{"message": "no library_name"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            return self._tell({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
        if asked["organization"] != "me":
            return self._tell({"error": "not yours"}, 403)
        self.hub.create(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._tell({"url": f"{self.hub.url}/{repo}"})

    def _preupload(self, repo: str, files: list[dict[str, Any]]) -> None:
        there = self.hub.files(repo)
        rows = []
        for file in files:
            name = file["path"]
            large = name.endswith(".safetensors") or file["size"] > 10_000_000
            oid = self.hub.etags[there[name]] if name in there else None
            rows.append({"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self._tell({"files": rows})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        rows = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            there = (self.hub.folder / wanted["oid"]).is_file()
            rows.append(wanted if there else wanted | {"actions": upload})
        self._tell({"objects": rows, "transfer": "basic"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        (header, *operations) = lines
        changes = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                # HubServer tells large files by their suffix.
                path = (self.hub.folder / value["oid"]).with_suffix(".safetensors")
                path.write_bytes((self.hub.folder / value["oid"]).read_bytes())
            else:
                path = self.hub.store(base64.b64decode(value["content"]))
            assert is_lfs(path) == (operation["key"] == "lfsFile")
            changes[value["path"]] = path
        revision = self.hub.commit(repo, header["value"]["summary"], changes)
        self._tell({"commitUrl": f"{self.hub.url}/{repo}/commit/{revision}", "commitOid": revision, "success": True})
