"""SeaweedFS, a real distributed store that speaks S3, as a second S3 for the tests of real processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import botocore.exceptions

from prefect_eachlabs.storage.s3_client import S3Access, client_of

KEY = "local"
START_SECONDS = 60.0
PARTS = ("master", "volume", "filer", "s3")


def free_ports(count: int) -> list[int]:
    """Ports that are all different: each is held until the last is found."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class SeaweedFS:
    """Master, volume server, filer and S3 gateway in one process on 127.0.0.1, with its data in a folder of its own.

    Args:
        weed: The program.
        folder: Where its data and its log go; keep it short, for it holds Unix sockets too.
        bucket: Made at the start.
        flags: Further flags of `weed server`.
    """

    def __init__(self, weed: Path, folder: Path, *, bucket: str, flags: Sequence[str] = ()) -> None:
        self._weed = weed
        self._flags = flags
        self._folder = folder
        self._bucket = bucket
        self._process: subprocess.Popen[bytes] | None = None
        self._leftovers: list[Path] = []
        self.url = ""

    @property
    def pid(self) -> int:
        """Of its process, which runs."""
        assert self._process is not None, "it was started"
        return self._process.pid

    @property
    def access(self) -> S3Access:
        return S3Access(endpoint_url=self.url, region="us-east-1", access_key_id=KEY, secret_access_key=KEY)

    def environment(self) -> dict[str, str]:
        """What makes boto3 in another process use it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> SeaweedFS:
        """Comes back when an object can be stored, some 4 s later.

        Raises:
            RuntimeError: It ended, or does not answer after a minute; shows the end of its log.
        """
        data = self._folder / "data"
        data.mkdir()
        # Each port has a gRPC twin, by default at +10000: named, so that it is a free one.
        ports = free_ports(2 * len(PARTS))
        flags = [f"-{part}.port={port}" for part, port in zip(PARTS, ports, strict=False)]
        flags += [f"-{part}.port.grpc={port}" for part, port in zip(PARTS, ports[len(PARTS) :], strict=True)]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=64", "-master.volumeSizeLimitMB=64"]
        flags += [f"-{part}.localSocket={self._folder}/{part}.sock" for part in ("filer", "s3")]
        flags += [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-filer",
            "-s3",
            f"-dir={data}",
            *self._flags,
        ]
        self._leftovers = [
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock")
            for part, port in zip(PARTS, ports[len(PARTS) :], strict=True)
        ]
        log = self._folder / "log"
        with log.open("wb") as written:
            self._process = subprocess.Popen(
                [self._weed, "-logtostderr", "server", *flags],
                cwd=self._folder,
                env={**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY},
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests; they end it
            )
        self.url = f"http://127.0.0.1:{ports[PARTS.index('s3')]}"
        try:
            self._wait_until_it_stores(log)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_it_stores(self, log: Path) -> None:
        assert self._process is not None
        s3 = client_of(self.access)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                s3.create_bucket(Bucket=self._bucket)
                s3.put_object(Bucket=self._bucket, Key="ready", Body=b"")
                s3.delete_object(Bucket=self._bucket, Key="ready")
                return
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise RuntimeError("SeaweedFS does not answer:\n" + "\n".join(said))

    def empty(self) -> None:
        """Deletes every object of its bucket."""
        client = client_of(self.access)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket):
            for row in page.get("Contents", ()):
                client.delete_object(Bucket=self._bucket, Key=row["Key"])

    def stop(self) -> None:
        """Kills it by its handle: nobody wants its data any more, and an orderly end takes it 15 s."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for socket_file in self._leftovers:
            socket_file.unlink(missing_ok=True)

    def __enter__(self) -> SeaweedFS:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
