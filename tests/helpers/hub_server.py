"""An in-memory stand-in for the Hugging Face Hub on localhost, for what pushing and loading request.

The wire format is that of huggingface_hub 2.4: commits as lines of JSON, large files by git-lfs, without Xet.

It knows users by their tokens, hides private repositories as the Hub does, keeps every commit, stores large files by
their hash, and can break the connection in the middle of an upload.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers
import yaml

LARGE = (".safetensors", ".bin", ".pt", ".png", ".onnx")


@dataclass
class Repository:
    """Commits by their hash, each a dictionary of all files by path; branches and tags by name."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(repr((len(self.commits), branch, sorted(files))).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        self.messages.append(message)
        return digest

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubServer(ThreadingHTTPServer):
    """The server; its ``url`` is what HF_ENDPOINT must be.

    Attributes:
        tokens: Users by token.
        repositories: By ``user/name``.
        stored: Large files by their SHA-256.
        requests: Method and path of every request, in order.
        breaks: Connections are closed in the middle of a request whose method and path match this pattern.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_of_ada": "ada", "hf_of_bob": "bob"}
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks: str | None = None
        self.failures: list[str] = []

    def environment(self, home, token: str | None = "hf_of_ada") -> dict[str, str]:
        """Return the environment of a process that uses this server and caches what it downloads in ``home``."""
        names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        signed_in = {} if token is None else {"HF_TOKEN": token}
        return kept | signed_in | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def create(self, name: str, private: bool = False) -> Repository:
        """Create a repository as the Hub does, with one commit."""
        repository = self.repositories[name] = Repository(name.split("/")[0], private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repository

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()
        assert not self.failures, self.failures[0]

    def handle_error(self, request, client_address):
        """Keep what went wrong in here, broken connections aside."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.failures.append(traceback.format_exc())


def connect(monkeypatch, server: HubServer, home) -> None:
    """Point huggingface_hub in this process, whose constants are read at import, to the server, signed in as ada."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage needs more than a stand-in
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))  # of retries
    monkeypatch.setenv("HF_TOKEN", "hf_of_ada")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str = "", body: dict | None = None, **headers: str):
        self.status = status
        self.body = {"error": message} | (body or {})
        self.headers = {"X-Error-Message": message, "X-Error-Code": code} | headers


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """Keep the tests' output clean."""

    def do_request(self):
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {unquote(path)}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.breaks and re.search(self.server.breaks, f"{self.command} {path}"):
            self.rfile.read(length // 2)
            raise ConnectionAbortedError
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            for method, pattern, respond in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    content, headers = respond(self, *map(unquote, match.groups()))
                    return self._send(200, content, headers)
            raise Refusal(404, f"No route for {self.command} {path}")
        except Refusal as refusal:
            self._send(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_request

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        try:
            return self.server.tokens[header.removeprefix("Bearer ")]
        except KeyError:
            raise Refusal(401, "Invalid credentials in Authorization header") from None

    def signed_in(self) -> str:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def repository(self, name: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.server.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and self.signed_in() != repository.owner:
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        resolved = repository.resolve(revision)
        if resolved is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return resolved

    def who_am_i(self):
        return as_json({"type": "user", "name": self.signed_in(), "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        wanted = json.loads(self.body)
        user = self.signed_in()
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            raise Refusal(409, "You already created this model repo", body={"url": url})
        self.server.create(name, private=wanted.get("visibility") == "private")
        return as_json({"url": url})

    def create_branch(self, name: str, branch: str):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repository.branches[branch] = self.revision(repository, start)
        return as_json({})

    def validate_card(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, flags=re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = []
        tags = metadata.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            errors.append({"message": '"tags" must be an array of strings'})
        for entry in metadata.get("model-index", []):
            errors += [
                {"message": f'"model-index[0].{key}" is required'} for key in {"name", "results"} - entry.keys()
            ]
        if errors:
            raise Refusal(400, "Invalid metadata in README.md", body={"errors": errors, "warnings": []})
        return as_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        present = repository.commits[self.revision(repository, revision)]
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (content := present.get(file["path"])) is not None:
                entry["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else git_hash(content)
            modes.append(entry)
        return as_json({"files": modes})

    def large_files(self, name: str):
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.server.stored:
                href = f"{self.server.url}/storage/{wanted['oid']}"
                wanted |= {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(wanted)
        return as_json({"transfer": "basic", "objects": objects})

    def store(self, digest: str):
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, "The content is not what was announced")
        self.server.stored[digest] = self.body
        return b"", {"ETag": f'"{digest}"'}

    def verify(self, digest: str):
        if len(self.server.stored.get(digest, b"")) != json.loads(self.body)["size"]:
            raise Refusal(404, "The file has not arrived")
        return as_json({})

    def commit(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        files = dict(repository.commits[self.revision(repository, revision)])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Refusal(400, f"{value['path']} has not been uploaded")
                files[value["path"]] = self.server.stored[value["oid"]]
            else:
                del files[value["path"]]
        digest = repository.commit(revision, files, message)
        url = f"{self.server.url}/{name}/commit/{digest}"
        return as_json({"success": True, "commitOid": digest, "commitUrl": url})

    def info(self, name: str, revision: str = "main"):
        repository = self.repository(name)
        digest = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[digest])]
        described = {"_id": "0", "id": name, "modelId": name, "sha": digest, "siblings": siblings, "tags": []}
        return as_json(described | {"private": repository.private})

    def tree(self, name: str, revision: str):
        repository = self.repository(name)
        entries = []
        for path, content in sorted(repository.commits[self.revision(repository, revision)].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return as_json(entries)

    def resolve(self, name: str, revision: str, path: str):
        repository = self.repository(name)
        digest = self.revision(repository, revision)
        content = repository.commits[digest].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": digest})
        headers = {"X-Repo-Commit": digest, "ETag": f'"{git_hash(content)}"'}
        if path.endswith(LARGE):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        return content, headers


def as_json(value) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {}


NAME = "([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.who_am_i),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.create_branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.large_files),
    ("PUT", "/storage/([0-9a-f]+)", Handler.store),
    ("POST", "/storage/([0-9a-f]+)/verify", Handler.verify),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
