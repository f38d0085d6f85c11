"""A stranger that answers as the API and as S3: it quotes what it was sent, among signs that move terminals."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import quote

FORGED = "\r\n2026-11-24 12:00:00 | INFO | FORGED: all paid"
ESCAPES = "\x1b[2J\x1b]0;pwned\x07\x9b31m\u202e\u2066\u2028"
"""Clears the screen, names the window, colours (C1), turns the direction of the text, ends a line."""
MARKUP = "![x](https://evil.invalid/p.png)<img src=x onerror=alert(1)> www.evil.invalid *x* _y_ `z` [a]: b &amp; # h"
"""Markdown and HTML that load, link or run something where they are taken for more than words."""


def quoting(secret: str) -> str:
    """A text that quotes a secret in all its spellings, among signs that move terminals."""
    in_url = quote(secret, safe="")
    spelled = (
        secret,
        in_url,
        in_url.replace("%2F", "%2f").replace("%2B", "%2b").replace("%3D", "%3d"),
        json.dumps({"header": secret}),
        json.dumps({"header": secret}).replace("/", "\\/"),
        base64.b64encode(secret.encode()).decode(),
        base64.b64encode(f"user:{secret}".encode()).decode(),
        base64.urlsafe_b64encode(f"X-API-Key: {secret}".encode()).decode(),
    )
    return f"upstream refused X-API-Key: {secret}{FORGED}{ESCAPES} {' '.join(spelled)}"


def escaped_json(value: object) -> str:
    """JSON in which every character of a text is an escape (`\\u0073`), which a search of its bytes does not find."""
    if isinstance(value, str):
        return '"' + "".join(f"\\u{ord(sign):04x}" for sign in value if ord(sign) < 0x10000) + '"'
    if isinstance(value, dict):
        return "{" + ",".join(f"{escaped_json(name)}:{escaped_json(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(escaped_json, value)) + "]"
    return json.dumps(value)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, status: int, body: str, content_type: str = "application/json") -> None:
        data = body.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _key(self) -> str:
        return self.headers.get("X-API-Key") or ""


class _Api(_Handler):
    """What the prompt's first word says goes wrong: at the POST, or in the prediction."""

    def do_POST(self) -> None:
        order = json.loads(self._body() or b"{}")
        said = quoting(self._key())
        how = str(order.get("input", {}).get("prompt", "")).partition(" ")[0]
        if how == "refused":
            self._say(422, escaped_json({"error": said, "details": {said: said}}))
        elif how == "plain":
            self._say(400, said, "text/plain")
        elif how == "throttled":
            self._say(402, json.dumps({"message": said}))
        elif how == "lost":
            self._say(500, said, "text/plain")
        else:
            prediction_id = f"p-{next(self.server.numbers)}"
            self.server.made[prediction_id] = (how, order)
            self._say(200, json.dumps({"predictionID": prediction_id, "message": said}))

    def do_GET(self) -> None:
        said = quoting(self._key())
        if self.path.startswith("/v1/executions"):
            self._say(200, json.dumps({"executions": []}))
            return
        if self.path.startswith("/files/"):
            self._say(200, said, "text/plain")
            return
        prediction_id = self.path.rpartition("/")[2]
        if prediction_id not in self.server.made:
            self._say(404, json.dumps({"error": said}))
            return
        how, order = self.server.made[prediction_id]
        answer: dict[str, Any] = {"id": prediction_id, "status": "failed", "input": order["input"], "model": said}
        if how == "output":
            envelope = {"error_code": said, "error_message": said, "classification": {"category": said}}
            answer["output"] = escaped_json(envelope)
        elif how == "url":
            answer.update(status="success", output=f"{self.server.url}/files/p.png?ticket={self._key()}")
        elif how == "word":
            answer.update(status="success", output=said, echo=said)
        else:
            answer[how] = said
        self._say(200, escaped_json(answer))


class _S3(_Handler):
    """Refuses everything with what a debugging store may quote: the secrets of whoever asked."""

    def _refuse(self) -> None:
        self._body()
        said = quoting(self.server.secret).replace("&", "&amp;").replace("<", "&lt;")
        # XML 1.0 takes no control characters but these, not even as references.
        fine = "".join(sign for sign in said if sign >= " " or sign in "\n\t")
        body = f"<Error><Code>Strange{chr(0x202E)}</Code><Message>{fine}</Message><Region>{fine}</Region></Error>"
        self._say(400, body if self.command != "HEAD" else "", "application/xml")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse


@contextmanager
def hostile(kind: type[_Handler], **facts: Any) -> Iterator[str]:
    """Its URL, while it answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        url = f"http://127.0.0.1:{server.server_port}"
        vars(server).update(numbers=count(1), made={}, url=url, **facts)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield url
        finally:
            server.shutdown()
            thread.join()


def hostile_api() -> Any:
    """The API, for a `with`."""
    return hostile(_Api)


def hostile_s3(secret: str) -> Any:
    """S3, for a `with`; `secret` is what it quotes."""
    return hostile(_S3, secret=secret)
