"""A Hub on loopback: what the client asks of it when a model is uploaded, and what it then holds."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_a_test"


@dataclass
class FakeHub:
    """``repositories`` hold files by name; ``blobs`` are large files by hash; ``commits`` counts."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    commits: int = 0
    address: str = ""

    def server(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _answer(self, status: int, value: Any = None, **headers: str) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name.replace("_", "-"), text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                hub.asked.append(f"GET {self.path}")
                name = self.path.removeprefix("/api/models/")
                if name not in hub.repositories:
                    self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                    return
                files = [{"rfilename": file} for file in hub.repositories[name]]
                self._answer(200, {"id": name, "private": hub.private[name], "siblings": files})

            def do_PUT(self) -> None:
                hub.asked.append("PUT a blob")
                hub.blobs[self.path.removeprefix("/blobs/")] = self._body()
                self._answer(200)

            def do_POST(self) -> None:
                hub.asked.append(f"POST {self.path}")
                body = self._body()
                if self.path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, {"error": "Invalid username or password."})
                elif self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = (
                        f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
                    )
                    hub.repositories[name] = {".gitattributes": b""}
                    hub.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                    self._answer(200, {"url": f"{hub.address}/{name}"})
                elif "/preupload/" in self.path:
                    files = [
                        {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                    self._answer(200, {"files": files})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        wanted | {"actions": {"upload": {"href": f"{hub.address}/blobs/{wanted['oid']}"}}}
                        for wanted in json.loads(body)["objects"]
                    ]
                    self._answer(200, {"transfer": "basic", "objects": objects})
                elif "/commit/" in self.path:
                    name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                    for line in map(json.loads, body.splitlines()):
                        hub._take(name, line["key"], line["value"])
                    hub.commits += 1
                    address = f"{hub.address}/{name}/commit/{hub.commits}"
                    self._answer(200, {"success": True, "commitUrl": address, "commitOid": f"{hub.commits:040}"})
                else:
                    self._answer(200, {"warnings": [], "errors": []})

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        return server

    def _take(self, name: str, kind: str, value: dict[str, Any]) -> None:
        files = self.repositories[name]
        if kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            files[value["path"]] = self.blobs[value["oid"]]
        else:
            assert kind == "header", kind


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
