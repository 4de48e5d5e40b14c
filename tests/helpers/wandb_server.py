"""A server that answers W&B's library as far as a run needs it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """A server on this machine.

    Attributes:
        knows_key: whether it accepts API keys.
        url: its address.
        history: the rows of metrics that it received.
    """

    knows_key: bool = True
    url: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data that a GraphQL query asks for."""
        if "UpsertBucket" in query:
            project = {"id": "p", "name": "priorzero", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": "x", "displayName": "x", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            return {"model": None}
        return {"viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}"}}

    def receive(self, stream: dict[str, Any]) -> None:
        """Keep the metrics of a part of a run's file stream."""
        chunk = stream.get("files", {}).get("wandb-history.jsonl", {})
        self.history += [json.loads(line) for line in chunk.get("content", [])]


@contextlib.contextmanager
def wandb_server(*, knows_key: bool = True) -> Iterator[WandbServer]:
    """Within the block, the server runs; at its end, connections are refused."""
    about = WandbServer(knows_key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200 if about.knows_key else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("/graphql"):
                request = json.loads(body)
                query = f"{request.get('operationName')} {request['query']}"
                self.reply({"data": about.answer(query, request.get("variables") or {})})
                return
            if self.path.endswith("/file_stream"):
                about.receive(json.loads(body))
            self.reply({})

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        about.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield about
        finally:
            server.shutdown()
