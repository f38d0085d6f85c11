"""Who edits a block gets no signature of the workers' own keys, and leads no worker to a metadata service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prefect_eachlabs import S3Destination, generate_and_store
from prefect_eachlabs.errors import EachlabsError, SetupError
from prefect_eachlabs.net.endpoints import checked_endpoint
from tests.flows.flow_fixtures import Studio

KEYS: dict[str, Any] = {
    "access_key_id": "AKIAOFTHEBLOCK",
    "secret_access_key": "a-secret-of-the-block",
    "region": "us-east-1",
}


@contextmanager
def stranger() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A host that a block names as its store: its URL, and the headers of all that it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append(dict(self.headers.items()))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_HEAD = do_POST = answer

        def log_message(self, format: str, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def test_the_workers_keys_sign_nothing_for_an_endpoint_that_a_block_names(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-the-workers-role")
    with stranger() as (url, seen):
        with pytest.raises(SetupError, match=r"it needs an access key of its own.*Nothing was bought"):
            generate_and_store.fn("a fox", destination=S3Destination(bucket="acme", endpoint_url=url))
        assert seen == []
        with pytest.raises(EachlabsError):  # with keys of its own it is asked, and says 403
            generate_and_store.fn("a fox", destination=S3Destination(bucket="acme", endpoint_url=url, **KEYS))
        assert seen
        for headers in seen:
            assert "AKIAOFTHEBLOCK" in headers["Authorization"]
            assert "a-token-of-the-workers-role" not in str(headers)
    assert studio.billed == 0


def test_an_endpoint_that_the_worker_itself_names_is_signed_for_with_its_own_keys(studio: Studio) -> None:
    bucket, _, prefix = studio.destination.removeprefix("s3://").partition("/")
    for url in (studio.s3.url, f"{studio.s3.url}/"):
        block = S3Destination(bucket=bucket, prefix=prefix, endpoint_url=url)
        assert generate_and_store.fn("a fox", destination=block).uri


def test_a_block_of_prefect_aws_without_keys_has_none_of_its_own(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws = pytest.importorskip("prefect_aws.credentials")
    with stranger() as (url, seen):
        of_a_stranger = aws.AwsClientParameters(endpoint_url=url)
        aws.AwsCredentials(region_name="us-east-1", aws_client_parameters=of_a_stranger).save("keyless", overwrite=True)
        for endpoint in ("", url):
            block = S3Destination(bucket="acme", aws_credentials_block="keyless", endpoint_url=endpoint)
            with pytest.raises(SetupError, match="an access key of its own"):
                block.access()
        assert seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254",
        "https://169.254.169.254/",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://169.254.43518",
        "https://[::ffff:169.254.169.254]",
        "https://[fd00:ec2::254]",
        "http://[fe80::1%25eth0]:80",
        "https://100.100.100.200",
        "https://168.63.129.16.",
    ],
)
def test_no_block_leads_to_a_metadata_service(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("", "*.internal", "10.0.0.0/8"):
        monkeypatch.setenv("EACHLABS_PRIVATE_HOSTS", named)
        with pytest.raises(ValueError, match="metadata"):
            checked_endpoint(url, has_keys=True)


def test_a_name_that_leads_to_a_metadata_service_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, *_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", ("93.184.215.14", 0)), (2, 1, 6, "", ("169.254.169.254", 0))]

    monkeypatch.setattr("prefect_eachlabs.net.endpoints.socket.getaddrinfo", lookup)
    monkeypatch.setenv("EACHLABS_PRIVATE_HOSTS", "store.example.com")
    with pytest.raises(ValueError, match="metadata"):
        checked_endpoint("https://store.example.com", has_keys=True)


@pytest.mark.parametrize(
    ("url", "named", "fine"),
    [
        ("https://10.0.0.7:9000", "", True),
        ("http://127.0.0.1:9000", "", True),
        ("http://localhost:9000", "", True),
        ("http://10.0.0.7:9000", "", False),
        ("http://10.0.0.7:9000", "10.0.0.0/8", True),
        ("http://minio.invalid:9000", "", False),
        ("http://minio.invalid:9000", "minio.invalid", True),
        ("https://minio.invalid", "", True),
        ("http://user:word@127.0.0.1:9000", "", False),
        ("https://minio.invalid/?x=1", "", False),
        ("https://minio.invalid:99999", "", False),
        ("http://127.0.0.1:9000#@169.254.169.254", "", False),
        ("https:///x", "", False),
    ],
)
def test_keys_go_over_http_to_this_machine_and_to_hosts_that_an_operator_named(
    url: str, named: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EACHLABS_PRIVATE_HOSTS", named)
    if fine:
        assert checked_endpoint(url, has_keys=True) == url
    else:
        with pytest.raises(SetupError, match="Nothing was bought") as refused:
            S3Destination(bucket="acme", endpoint_url=url, **KEYS).access()
        assert "word" not in str(refused.value)
