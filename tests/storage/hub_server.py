"""A server on loopback that speaks as much of the hub's protocol as huggingface_hub needs to push a folder and to pull it."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """repositories: name -> path -> contents.  stored: large files by SHA-256.  seen: every request line, with its authorization."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, str]] = []
        self.refuse = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None: ...

    def answer(self, content: object, status: int = 200, head: bool = False, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.server.seen.append(("POST", path, self.headers.get("Authorization", "")))
        if self.server.refuse:
            return self.answer({"error": "you may not"}, 403)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else f"me/{wanted['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = [{**one, "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"} for one in asked]
            return self.answer({"files": [{"path": m["path"], "uploadMode": m["uploadMode"], "shouldIgnore": False} for m in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}} for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.repositories[name][line["value"]["path"]] = self.server.stored[line["value"]["oid"]]
            oid = self.commit(name)
            return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"})
        self.answer({"error": f"no such place: {path}"}, 404)

    def do_PUT(self) -> None:
        body = self.body()
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.answer(b"")

    def commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.server.repositories[name].items())).encode()).hexdigest()

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append(("GET", path, self.headers.get("Authorization", "")))
        if path.startswith("/api/models/"):
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if name not in self.server.repositories:
                return self.answer({"error": "Repository not found"}, 404, head, X_Error_Code="RepoNotFound")
            contents = self.server.repositories[name]
            if "/tree/" in path:
                return self.answer(
                    [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in contents.items()]
                )
            return self.answer({"id": name, "sha": self.commit(name), "siblings": [{"rfilename": p} for p in contents]}, head=head)
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, head, X_Error_Code="EntryNotFound")
        self.answer(content, 200, head, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.commit(name))


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
