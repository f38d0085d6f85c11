"""A local S3 server for the demo and the tests: moto's S3 behind a keep-alive HTTP server, with faults on demand.

    with LocalS3(buckets=["pictures"]) as s3:
        store = S3Store("pictures", s3.access)

or as a process: `prefect-eachlabs s3 --port 9000`. Needs the extra `demo`.

It differs from moto's own server where that matters here: every request takes effect under one lock, so that
conditional puts are atomic (moto checks, then puts, without one); SHA-256 checksums are checked; connections are kept
alive; objects can be kept in a folder; a request is a line in the log at level INFO.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import mimetypes
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import parse_qs, quote, unquote

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.net.redaction import shown
from prefect_eachlabs.storage.s3_client import S3Access

try:
    from moto.moto_server.werkzeug_app import create_backend_app
    from moto.s3.models import FakeKey, s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server
    from werkzeug.test import run_wsgi_app
except ImportError as error:
    raise SetupError(f"The local S3 server needs {error.name}: pip install 'prefect-eachlabs[demo]'.") from error

ACCOUNT = "123456789012"
REGION = "us-east-1"
COUNTS = "/_local_s3/counts"
"""Where another process reads what `counts` says."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which requests.

    Attributes:
        action: `refuse` answers an error before anything is applied; `lose` applies it and closes the connection
            without an answer; `cut` applies it and closes the connection halfway through the answer's body.
        method: PUT, GET, HEAD or LIST.
        nth: The first request it strikes, counted from 1 at the moment it is set; boto3's own repetitions count.
        times: How many requests in a row it strikes.
        key_contains: Only requests whose `bucket/key` contains this are counted and struck.
        status: The HTTP status of a refusal.
        code: S3's error code of a refusal.
    """

    action: Literal["refuse", "lose", "cut"]
    method: str = "PUT"
    nth: int = 1
    times: int = 1
    key_contains: str = ""
    status: int = 503
    code: str = "SlowDown"


class _Answer(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes
    sent_bytes: int | None = None
    """How much of the body is sent before the connection is closed; None: all of it, and it stays open."""


def _error(status: int, code: str, message: str) -> _Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return _Answer(status, [("Content-Type", "application/xml")], body.encode())


class LocalS3:
    """S3 on 127.0.0.1, in a thread of this process. Credentials are not checked.

    moto's state belongs to the process: servers that run side by side hold the same objects (each has its own faults
    and counts), the first to start finds nothing, and the last to stop leaves nothing.

    Args:
        port: 0 takes a free one.
        buckets: Made at the start.
        folder: Keeps the objects: what is in it is served from the start (read into memory), and what is written
            through this server is a file `BUCKET/KEY` there. None: they go with the process.
    """

    _one_at_a_time: ClassVar[threading.Lock] = threading.Lock()
    _running: ClassVar[set[LocalS3]] = set()

    def __init__(self, *, port: int = 0, buckets: Iterable[str] = (), folder: Path | None = None) -> None:
        self._wanted_port = port
        self._buckets = tuple(buckets)
        self._kept = None if folder is None else _Kept(folder)
        self._plan_lock = threading.Lock()
        self._faults: list[Fault] = []
        self._met: list[int] = []
        self._latency_seconds = 0.0
        self._counts: Counter[str] = Counter()
        self._app: Any = None
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.connections: dict[socket.socket, threading.Thread] = {}
        self.url = ""

    def __enter__(self) -> LocalS3:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves until `stop`. Raises OSError when the port is taken, or the folder cannot be read and written."""
        with socket.create_server(("127.0.0.1", self._wanted_port), backlog=128) as listening:
            # The server gets our own socket: by itself it would end the process when the port is taken.
            number = listening.fileno()
            app = cast(Any, self)  # the handler calls `answer` instead
            self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Handler, fd=number)
        try:
            with self._one_at_a_time:
                if not self._running:
                    _forget_everything()
                self._running.add(self)
                self._app = create_backend_app("s3")
                if self._kept is not None:
                    self._kept.read()
            for name in self._buckets:
                self.create_bucket(name)
        except BaseException:
            self._server.server_close()
            self._running.discard(self)
            raise
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="local-s3", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes the port and every connection, and waits for their threads."""
        if self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._thread = None
        for connection, thread in list(self.connections.items()):
            with contextlib.suppress(OSError):  # it ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)
        with self._one_at_a_time:
            self._running.discard(self)
            if not self._running:
                _forget_everything()

    @property
    def access(self) -> S3Access:
        """Endpoint and (arbitrary) keys for `S3Store`."""
        return S3Access(endpoint_url=self.url, region=REGION, access_key_id="local", secret_access_key="local")

    def environment(self) -> dict[str, str]:
        """What makes boto3 in another process use this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def create_bucket(self, name: str) -> None:
        """Makes the bucket; well when it is there."""
        with self._one_at_a_time:
            backend = s3_backends[ACCOUNT]["aws"]
            if name not in backend.buckets:
                backend.create_bucket(name, REGION)
            if self._kept is not None:
                self._kept.write(name, "")

    def set_faults(self, *faults: Fault, latency_seconds: float = 0.0) -> None:
        """Replaces the faults; each begins to count now. Without arguments everything is well again."""
        with self._plan_lock:
            self._faults, self._met = list(faults), [0] * len(faults)
            self._latency_seconds = latency_seconds

    def counts(self) -> dict[str, int]:
        """Requests since the start, refused ones too, by method and folder: `{"PUT pictures/daily/records": 3}`."""
        with self._plan_lock:
            return dict(self._counts)

    def answer(self, environ: dict[str, Any], body: bytes) -> _Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1").decode(errors="replace")
        if path == COUNTS:
            return _Answer(200, [("Content-Type", "application/json")], json.dumps(self.counts()).encode())
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        if method == "GET" and "list-type" in query:
            method, path = "LIST", f"{path.rstrip('/')}/{query.get('prefix', [''])[0]}"
        fault, latency_seconds = self._meet(method, path.lstrip("/"))
        if latency_seconds:
            time.sleep(latency_seconds)
        if fault and fault.action == "refuse":
            return _error(fault.status, fault.code, "A fault that was asked for.")
        if (checksum := environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")) is not None:
            if base64.b64encode(hashlib.sha256(body).digest()).decode() != checksum:
                return _error(400, "BadDigest", "The SHA-256 checksum does not match the body.")
            environ["HTTP_X_AMZ_SDK_CHECKSUM_ALGORITHM"] = "SHA256"  # without it moto forgets the checksum
        answer = self._ask_moto(environ, body)
        if fault:
            return answer._replace(sent_bytes=0 if fault.action == "lose" else len(answer.body) // 2)
        return answer

    def _ask_moto(self, environ: dict[str, Any], body: bytes) -> _Answer:
        # The body has been read before: a slow upload holds nobody up.
        environ.update(
            {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True, "CONTENT_LENGTH": str(len(body))}
        )
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        with self._one_at_a_time:
            chunks, status, headers = run_wsgi_app(self._app, environ, buffered=True)
            answer = _Answer(int(status.split()[0]), list(headers), b"".join(chunks))
            if self._kept is not None and answer.status < 300 and environ["REQUEST_METHOD"] in _WRITES:
                bucket, _, key = environ["PATH_INFO"].encode("latin-1").decode(errors="replace")[1:].partition("/")
                self._kept.write(bucket, key)
            return answer

    def _meet(self, method: str, path: str) -> tuple[Fault | None, float]:
        with self._plan_lock:
            self._counts[f"{method} {path.rpartition('/')[0] or path}"] += 1
            struck = None
            for index, fault in enumerate(self._faults):
                if fault.method == method and fault.key_contains in path:
                    self._met[index] += 1
                    if fault.nth <= self._met[index] < fault.nth + fault.times:
                        struck = struck or fault
            return struck, self._latency_seconds


_WRITES = ("PUT", "POST", "DELETE")


class _Kept:
    """moto's objects as files `BUCKET/KEY` of a folder; what S3 keeps beside their bytes is in `.s3/`.

    No key leads out of it: what is special to a file system is escaped. Files that somebody else put there are
    objects from the next start on. Called under the lock of moto's state.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> None:
        """Makes everything in the folder an object of moto's."""
        (self._folder / ".s3").mkdir(parents=True, exist_ok=True)
        backend = s3_backends[ACCOUNT]["aws"]
        for place in self._folder.glob("[!.]*/"):
            bucket = _name(place.name)
            if bucket not in backend.buckets:
                backend.create_bucket(bucket, REGION)
            for path, key in self._files(place):
                body = path.read_bytes()
                beside: dict[str, Any] = {}
                with contextlib.suppress(OSError, ValueError):
                    beside = json.loads(self._beside(bucket, key).read_bytes())
                if beside.get("sha256") != hashlib.sha256(body).hexdigest():
                    beside = {"metadata": {"Content-Type": mimetypes.guess_type(key)[0] or "binary/octet-stream"}}
                made = backend.put_object(bucket, key, body)
                made.set_metadata(beside["metadata"], replace=True)
                made.checksum_algorithm, made.checksum_value = beside.get("checksum", (None, None))
                made.last_modified = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).replace(tzinfo=None)

    def write(self, bucket: str, key: str) -> None:
        """Brings the folder up to date with what moto holds under a key; without one, with all that is gone."""
        held = s3_backends[ACCOUNT]["aws"].buckets.get(bucket)
        place = self._folder / _part(bucket)
        if held is not None:
            place.mkdir(exist_ok=True)
        for one in [key] if key else [key for _, key in self._files(place)]:
            path = place.joinpath(*map(_part, one.split("/")))
            found = None if held is None else held.keys.get(one)
            if isinstance(found, FakeKey):
                body = found.value
                beside = {
                    "metadata": dict(found.metadata),
                    "checksum": (found.checksum_algorithm, found.checksum_value),
                    "sha256": hashlib.sha256(body).hexdigest(),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                self._replace(self._beside(bucket, one), json.dumps(beside).encode())
                self._replace(path, body)
            else:
                path.unlink(missing_ok=True)
                self._beside(bucket, one).unlink(missing_ok=True)
        if held is None:
            for empty in sorted(place.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):  # somebody else's files are in it
                    empty.rmdir()

    def _replace(self, path: Path, body: bytes) -> None:
        new = self._folder / ".s3" / "new"
        new.write_bytes(body)
        new.replace(path)

    def _beside(self, bucket: str, key: str) -> Path:
        return self._folder / ".s3" / (hashlib.sha256(f"{bucket}/{key}".encode()).hexdigest() + ".json")

    @staticmethod
    def _files(place: Path) -> list[tuple[Path, str]]:
        files = [path for path in place.rglob("*") if path.is_file()]
        return [(path, "/".join(map(_name, path.relative_to(place).parts))) for path in files]


def _part(name: str) -> str:
    """A part of a key as a file's name, and back: `_name`."""
    return "%" if not name else name.replace(".", "%2E") if set(name) == {"."} else quote(name, safe=" !'()+,;=@")


def _name(part: str) -> str:
    return "" if part == "%" else unquote(part)


def _forget_everything() -> None:
    for account in list(s3_backends.values()):
        for backend in list(account.values()):
            backend.reset()


class _Handler(WSGIRequestHandler):
    """One connection, kept alive: werkzeug's own way of answering closes it after each request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._owner = cast(LocalS3, self.server.app)
        self._owner.connections[self.connection] = threading.current_thread()

    def finish(self) -> None:
        self._owner.connections.pop(self.connection, None)
        super().finish()

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        size = -1 if "wsgi.input_terminated" in environ else int(environ.get("CONTENT_LENGTH") or 0)
        try:
            body = environ["wsgi.input"].read(size)
        except OSError:  # the end of a chunk that never came
            body = None
        if body is None or len(body) < size:  # who sent it was killed on the way: as on S3, nothing is written
            self.close_connection = True
            return
        try:
            answer = self._owner.answer(environ, body)
        except Exception:
            logger.exception("The local S3 server failed at %s %s.", self.command, self.path.partition("?")[0])
            answer = _error(500, "InternalError", "See the log of the local S3 server.")
        line, path = "%s %s: HTTP %d, %d bytes in, %d out", shown(unquote(self.path.partition("?")[0]))
        logger.info(line, self.command, path, answer.status, len(body), len(answer.body))
        if answer.sent_bytes is not None:
            self.close_connection = True
        if answer.sent_bytes == 0:
            return
        self.send_response(answer.status)
        names = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            if name.lower() not in ("date", "server", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if "content-length" not in names and answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        sent = b"" if self.command == "HEAD" else answer.body[: answer.sent_bytes]
        # In one piece: two small writes on a kept connection can wait 40 ms for each other's acknowledgement.
        self._headers_buffer.append(b"\r\n" + sent)
        self.flush_headers()

    def log(self, type: str, message: str, *args: Any) -> None:
        pass
