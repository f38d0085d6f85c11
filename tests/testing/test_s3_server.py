"""The local S3 server keeps S3's rules where the project leans on them, and breaks them on demand alone."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError

from prefect_eachlabs.testing.s3 import Fault, LocalS3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with LocalS3(buckets=["pictures"]) as running:
        yield running


@pytest.fixture
def s3(server: LocalS3) -> Iterator[LocalS3]:
    yield server
    server.set_faults()


SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request, Signature=any"}

Clients = Callable[..., Any]


@pytest.fixture
def client(s3: LocalS3) -> Iterator[Clients]:
    """`client()` makes a boto3 client of the server, which is closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(*, attempts: int = 1, url: str = s3.url) -> Any:
            config = Config(retries={"total_max_attempts": attempts}, max_pool_connections=20)
            boto = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=config)
            stack.callback(boto.close)
            return boto

        yield make


def code_of(error: ClientError) -> tuple[str, int]:
    answer: Any = error.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns a thousand times more often, and meet between a check and its put."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("condition", ["IfNoneMatch", "IfMatch"])
def test_a_conditional_put_among_many_at_once_succeeds_exactly_once(client: Clients, condition: str) -> None:
    boto = client()
    for round_number in range(5):
        key, start, expected = f"{condition}/{round_number}", threading.Barrier(8), "*"
        if condition == "IfMatch":
            expected = boto.put_object(Bucket="pictures", Key=key, Body=b"first")["ETag"]

        def put(number: int, key: str = key, start: threading.Barrier = start, expected: str = expected) -> object:
            start.wait()
            try:
                boto.put_object(Bucket="pictures", Key=key, Body=str(number).encode(), **{condition: expected})
            except ClientError as error:
                return code_of(error)
            return number

        with ThreadPoolExecutor(8) as pool:
            *lost, won = sorted(pool.map(put, range(8)), key=lambda one: isinstance(one, int))
        assert set(lost) == {("PreconditionFailed", 412)}
        assert boto.get_object(Bucket="pictures", Key=key)["Body"].read() == str(won).encode()


def test_connections_are_kept_alive_over_all_kinds_of_answers(s3: LocalS3) -> None:
    connection = http.client.HTTPConnection(s3.url.removeprefix("http://"))
    ports, last = set(), b""
    for method, path, body in (
        ("PUT", "/pictures/kept/1", b"x" * 1500),
        ("PUT", "/pictures/kept/2", b""),
        ("GET", "/pictures/kept/1", None),
        ("HEAD", "/pictures/kept/1", None),
        ("HEAD", "/pictures/kept/none", None),
        ("GET", "/pictures/kept/none", None),
        ("GET", "/pictures?list-type=2", None),
        ("DELETE", "/pictures/kept/2", None),
        ("GET", "/_local_s3/counts", None),
        ("GET", "/pictures/kept/1", None),
    ):
        connection.request(method, path, body, SIGNED)
        answer = connection.getresponse()
        last = answer.read()
        assert answer.status < 500
        ports.add(connection.sock.getsockname()[1])
    assert len(ports) == 1
    assert last == b"x" * 1500
    connection.close()


def test_a_body_in_chunks_is_taken_whole(s3: LocalS3) -> None:
    connection = http.client.HTTPConnection(s3.url.removeprefix("http://"))
    connection.request("PUT", "/pictures/chunked", iter([b"one", b"two"]), SIGNED, encode_chunked=True)
    assert connection.getresponse().read() == b""
    connection.request("GET", "/pictures/chunked", headers=SIGNED)
    assert connection.getresponse().read() == b"onetwo"
    connection.close()


@pytest.mark.parametrize("head", ["Content-Length: 100\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n64\r\n"])
def test_a_put_whose_sender_is_killed_on_the_way_is_not_applied(s3: LocalS3, client: Clients, head: str) -> None:
    host, port = s3.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        lines = [
            "PUT /pictures/half HTTP/1.1",
            f"Host: {host}",
            *(f"{name}: {value}" for name, value in SIGNED.items()),
        ]
        connection.sendall(("\r\n".join(lines) + f"\r\n{head}half").encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1_000) == b"", "it is not answered"
    assert client().list_objects_v2(Bucket="pictures", Prefix="half")["KeyCount"] == 0


def test_a_refused_put_is_not_applied_and_the_next_one_is(s3: LocalS3, client: Clients) -> None:
    boto = client()
    s3.set_faults(Fault("refuse", nth=2, key_contains="refused/"))
    boto.put_object(Bucket="pictures", Key="refused/1", Body=b"1")
    with pytest.raises(ClientError) as caught:
        boto.put_object(Bucket="pictures", Key="refused/2", Body=b"2")
    assert code_of(caught.value) == ("SlowDown", 503)
    boto.put_object(Bucket="pictures", Key="refused/3", Body=b"3")
    keys = [row["Key"] for row in boto.list_objects_v2(Bucket="pictures", Prefix="refused/")["Contents"]]
    assert keys == ["refused/1", "refused/3"]


def test_a_lost_put_is_applied_and_the_connection_ends_without_an_answer(s3: LocalS3, client: Clients) -> None:
    boto = client()
    s3.set_faults(Fault("lose"))
    with pytest.raises(ConnectionClosedError):
        boto.put_object(Bucket="pictures", Key="lost", Body=b"there")
    assert boto.get_object(Bucket="pictures", Key="lost")["Body"].read() == b"there"


def test_a_lost_conditional_put_that_boto3_repeats_meets_its_own_body(s3: LocalS3, client: Clients) -> None:
    s3.set_faults(Fault("lose"))
    boto = client(attempts=2)
    with pytest.raises(ClientError) as caught:
        boto.put_object(Bucket="pictures", Key="lost-conditional", Body=b"mine", IfNoneMatch="*")
    assert code_of(caught.value) == ("PreconditionFailed", 412)
    assert boto.get_object(Bucket="pictures", Key="lost-conditional")["Body"].read() == b"mine"


def test_faults_strike_the_method_the_key_and_as_often_as_asked(s3: LocalS3, client: Clients) -> None:
    boto = client()
    boto.put_object(Bucket="pictures", Key="struck", Body=b"1")
    s3.set_faults(
        Fault("refuse", method="GET", times=2, key_contains="struck"),
        Fault("refuse", method="LIST", status=403, code="AccessDenied"),
    )
    boto.put_object(Bucket="pictures", Key="struck", Body=b"2")
    for _ in range(2):
        with pytest.raises(ClientError):
            boto.get_object(Bucket="pictures", Key="struck")
    assert boto.get_object(Bucket="pictures", Key="struck")["Body"].read() == b"2"
    with pytest.raises(ClientError) as caught:
        boto.list_objects_v2(Bucket="pictures")
    assert code_of(caught.value) == ("AccessDenied", 403)
    boto.list_objects_v2(Bucket="pictures")


def test_counts_tell_method_and_folder(s3: LocalS3, client: Clients) -> None:
    boto = client()
    before = s3.counts()
    for name in ("a", "b"):
        boto.put_object(Bucket="pictures", Key=f"daily/records/{name}.json", Body=b"{}")
    boto.head_object(Bucket="pictures", Key="daily/records/a.json")
    boto.list_objects_v2(Bucket="pictures", Prefix="daily/records/")
    s3.set_faults(Fault("refuse"))
    with pytest.raises(ClientError):
        boto.put_object(Bucket="pictures", Key="daily/images/a.png", Body=b"")
    counts = {name: count - before.get(name, 0) for name, count in s3.counts().items()}
    assert {name: count for name, count in counts.items() if count} == {
        "PUT pictures/daily/records": 2,
        "HEAD pictures/daily/records": 1,
        "LIST pictures/daily/records": 1,
        "PUT pictures/daily/images": 1,
    }


def test_two_in_one_process_hold_the_same_objects_and_keep_faults_and_counts_apart(
    s3: LocalS3, client: Clients
) -> None:
    with LocalS3(buckets=["pictures"]) as other:
        other.set_faults(Fault("refuse", times=100))
        client().put_object(Bucket="pictures", Key="shared", Body=b"1")
        assert client(url=other.url).get_object(Bucket="pictures", Key="shared")["Body"].read() == b"1"
        assert other.counts() == {"GET pictures": 1}
    assert client().get_object(Bucket="pictures", Key="shared")["Body"].read() == b"1"


def test_as_a_command_it_says_its_url_and_each_request_and_ends_on_sigterm(client: Clients) -> None:
    command = [sys.executable, "-m", "prefect_eachlabs", "s3", "--port", "0", "--bucket", "pictures", "--verbose"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said, _, url = process.stdout.readline().strip().rpartition(" ")
        assert said == "Local S3 ready at"
        boto = client(url=url)
        boto.put_object(Bucket="pictures", Key="a", Body=b"x")
        with urllib.request.urlopen(f"{url}/_local_s3/counts") as counts:
            assert json.load(counts) == {"PUT pictures": 1}
        taken = [*command[:4], "--port", url.rpartition(":")[2]]
        refused = subprocess.run(taken, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "")
    assert re.search(r"^\d\d:\d\d:\d\d PUT /pictures/a: HTTP 200, 1 bytes in, 0 out$", errors, re.MULTILINE), errors
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"prefect-eachlabs: Port \d+ is taken: choose another with --port\.\n", refused.stderr)
    assert f"\n  export AWS_ENDPOINT_URL_S3={url} AWS_DEFAULT_REGION=us-east-1\n" in errors
    assert "Buckets: s3://pictures; " in errors


@pytest.fixture
def in_a_folder(tmp_path: Path) -> Callable[[str], Any]:
    """Runs a program with `boto`, a client of a server in a process of its own that keeps its objects in a folder."""
    start = (
        "import boto3\n"
        "from pathlib import Path\n"
        "from prefect_eachlabs.testing import LocalS3\n"
        f"with LocalS3(buckets=['pictures'], folder=Path({str(tmp_path / 'kept')!r})) as server:\n"
        "  boto = boto3.client('s3', endpoint_url=server.url)\n"
    )

    def run(program: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", start + "".join(f"  {line}\n" for line in program.splitlines())],
            cwd=ROOT,
            env={**os.environ, "AWS_DEFAULT_REGION": "us-east-1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


def test_objects_in_a_folder_are_there_again_as_they_were(in_a_folder: Callable[[str], Any], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    before = in_a_folder(
        "boto.put_object(Bucket='pictures', Key='d/fox.png', Body=b'fox', ContentType='image/png',\n"
        " Metadata={'prediction': 'p-1'}, ChecksumAlgorithm='SHA256')\n"
        "for key in ('gone', 'a/b/gone', '../out', 'd//x', '100%', 'é'): boto.put_object(Bucket='pictures', Key=key)\n"
        "boto.delete_object(Bucket='pictures', Key='gone')\n"
        "boto.delete_objects(Bucket='pictures', Delete={'Objects': [{'Key': 'a/b/gone'}]})\n"
        "print(boto.head_object(Bucket='pictures', Key='d/fox.png')['ETag'])"
    )
    assert (kept / "pictures" / "d" / "fox.png").read_bytes() == b"fox"
    assert not list(tmp_path.glob("out"))
    (kept / "pictures" / "mine.png").write_bytes(b"mine")
    after = in_a_folder(
        "found = boto.head_object(Bucket='pictures', Key='d/fox.png', ChecksumMode='ENABLED')\n"
        "print(found['ETag'], found['ContentType'], found['Metadata']['prediction'], found['ChecksumSHA256'])\n"
        "print(*(each['Key'] for each in boto.list_objects_v2(Bucket='pictures')['Contents']))\n"
        "print(boto.head_object(Bucket='pictures', Key='mine.png')['ContentType'])"
    )
    checksum = base64.b64encode(hashlib.sha256(b"fox").digest()).decode()
    assert after[:4] == [*before, "image/png", "p-1", checksum]
    assert after[4:] == ["../out", "100%", "d//x", "d/fox.png", "mine.png", "é", "image/png"]
