"""Pictures come from the internet alone: which hosts are refused, how they may be spelled, and who is connected to."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.api.references import Prober, References, Seen
from prefect_eachlabs.engine.engine import Engine
from prefect_eachlabs.errors import DownloadFailed, HostNotAllowed, NotAPng, SetupError
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.ledger.records import RecordState
from prefect_eachlabs.ledger.rules import PurchaseOptions
from prefect_eachlabs.models import Destination, Item, UploadSlot
from prefect_eachlabs.net.public_only import GuardedTransport, HostGuard, HostRefused
from prefect_eachlabs.settings import AccountSettings, settings_from_environment
from prefect_eachlabs.testing.emulator import EmulatorOptions, InProcessTransport
from tests.images.test_download import SMALL, Host
from tests.limits.local import local_limiter
from tests.memory_store import MemoryStore
from tests.net.real_time import in_real_time
from tests.virtual_time import run


def finding(*answers: str | Sequence[str]) -> Callable[[str], Awaitable[Sequence[str]]]:
    """A resolver that gives these answers in turn, the last one for ever; `asked` is who was looked up."""
    left = [[answer] if isinstance(answer, str) else list(answer) for answer in answers]

    async def resolve(host: str) -> Sequence[str]:
        resolve.asked.append(host)  # type: ignore[attr-defined]
        return left.pop(0) if len(left) > 1 else left[0]

    resolve.asked = []  # type: ignore[attr-defined]
    return resolve


def why_not(guard: HostGuard, host: str) -> str:
    """Why a host is refused by both doors; empty: both let it through."""

    async def story() -> str:
        said = []
        for door in (guard.addresses, guard.check):
            try:
                await door(host)
                said.append("")
            except HostRefused as error:
                said.append(str(error))
        assert said[0] == said[1]
        return said[0]

    return run(story())


# ------------------------------------------------------------------------------ addresses

REFUSED = {
    "127.8.9.10": "loopback",
    "::1": "loopback",
    "10.0.0.7": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "100.127.255.255": "private",  # carrier-grade NAT
    "fd12:3456::1": "private",
    "169.254.169.254": "metadata",
    "fe80::1%eth0": "metadata",
    "fd00:ec2::254": "metadata",
    "fd20:ce::254": "metadata",
    "100.100.100.200": "metadata",
    "192.0.0.192": "metadata",
    "168.63.129.16": "metadata",
    "0.1.2.3": "reserved",
    "::": "reserved",
    "fec0::1": "reserved",
    "224.0.0.1": "reserved",
    "ff02::1": "reserved",
    "198.18.0.1": "reserved",
    "255.255.255.255": "reserved",
    "2001:db8::1": "reserved",
    "4000::1": "reserved",
    # One address within another.
    "::ffff:127.0.0.1": "loopback",
    "::ffff:a9fe:a9fe": "metadata",
    "::127.0.0.1": "loopback",
    "2002:a9fe:a9fe::1": "metadata",
    "64:ff9b::10.0.0.7": "private",
    "64:ff9b:1::5db8:d70e": "reserved",
    "2001:0:5db8:d70e:0:0:5601:5601": "metadata",  # Teredo: the client is 169.254.169.254
    "2001:0:a00:7:0:0:a247:28f1": "private",  # Teredo: the server is 10.0.0.7
    # As a resolver reads it, and a person does not.
    "2130706433": "loopback",
    "017700000001": "loopback",
    "0x7f.1": "loopback",
    "127.1": "loopback",
    "0": "reserved",
    "0xA9.0xFE.0xA9.0xFE": "metadata",
    "169.254.169.254.": "metadata",
    "[::1]": "loopback",
}


def test_an_address_of_this_network_is_refused_in_any_spelling_and_by_any_name() -> None:
    for host, kind in REFUSED.items():
        assert kind in why_not(HostGuard(), host), host
        if host.count(":") >= 2 or host.count(".") == 3:
            said = why_not(HostGuard(resolve=finding(host)), "Evil.Example.ORG.")
            assert said.startswith(f"evil.example.org at {host}, ")
            assert kind in said


@pytest.mark.parametrize(
    "host",
    [
        "93.184.215.14",
        "8.8.8.8",
        "100.63.0.1",
        "100.128.0.1",
        "172.32.0.1",
        "2606:2800:21f::1",
        "64:ff9b::93.184.215.14",
    ],
)
def test_a_public_address_is_let_through(host: str) -> None:
    assert why_not(HostGuard(), host) == ""
    assert why_not(HostGuard(resolve=finding(host)), "pictures.example.org") == ""


@pytest.mark.parametrize(
    "url", ["http://①②⑦.0.0.1/", "http://127。0。0。1/", "http://[::ffff:7f00:1]/", "http://0X7F.1/"]
)
def test_what_a_url_makes_of_odd_letters_is_refused_or_no_url(url: str) -> None:
    with pytest.raises((HostRefused, httpx.InvalidURL)):
        run(
            GuardedTransport(HostGuard(resolve=None), httpx.MockTransport(Host(SMALL)._answer)).handle_async_request(
                httpx.Request("GET", url)
            )
        )


async def test_of_several_addresses_the_good_ones_are_used_and_where_others_choose_all_must_be_good() -> None:
    guard = HostGuard(resolve=finding(["10.0.0.7", "93.184.215.14", "::1", "2606:2800::1"]))
    assert await guard.addresses("a.example.org") == ["93.184.215.14", "2606:2800::1"]
    with pytest.raises(HostRefused, match=r"a\.example\.org at 10\.0\.0\.7"):
        await guard.check("a.example.org")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "printer.local", "wiki.internal", "nas.lan", "a.home.arpa"]
)
def test_a_name_of_this_network_that_nobody_here_can_look_up_is_not_left_to_a_proxy(host: str) -> None:
    with pytest.raises(HostRefused, match="a name of this network alone"):
        run(HostGuard(resolve=None).check(host))
    run(HostGuard(resolve=None).check("pictures.example.org"))


# --------------------------------------------------------------------- the API's own place


@pytest.mark.parametrize(
    ("api", "opened", "closed"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1", "::1", "10.0.0.7", "100.64.0.1"],
            ["169.254.169.254", "fd00:ec2::254", "224.0.0.1", "0.0.0.0"],
        ),
        ("localhost", ["127.0.0.1", "192.168.0.1"], ["169.254.169.254"]),
        ("[::1]", ["127.0.0.1"], ["fe80::1"]),
        ("10.1.1.1", ["10.0.0.7", "fd12::1", "100.64.0.1"], ["127.0.0.1", "0.0.0.0", "::1", "169.254.169.254"]),
        ("169.254.169.254", [], ["169.254.169.254", "10.0.0.7", "127.0.0.1"]),
        ("93.184.215.14", [], ["127.0.0.1", "10.0.0.7"]),
        ("", [], ["127.0.0.1"]),
    ],
)
def test_pictures_may_be_where_the_api_is_but_never_where_metadata_are(
    api: str, opened: list[str], closed: list[str]
) -> None:
    guard = HostGuard(api_host=api)
    assert {host: why_not(guard, host) for host in opened} == dict.fromkeys(opened, "")
    assert all(why_not(guard, host) for host in closed)


def test_a_gateway_by_its_name_opens_its_network_only_when_all_of_its_addresses_are_private() -> None:
    for of_api, opened in ((["10.1.1.1"], True), (["10.1.1.1", "93.184.215.14"], False), (["169.254.1.1"], False)):
        resolve = finding(["10.0.0.7"], of_api, ["10.0.0.7"], of_api)
        assert (why_not(HostGuard(api_host="gateway.example.org", resolve=resolve), "a.example.org") == "") is opened


# -------------------------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("setting", "host", "address", "opened"),
    [
        ("", "nas.corp.example", "10.0.0.7", False),
        ("nas.corp.example", "nas.corp.example", "10.0.0.7", True),
        ("NAS.corp.example.", "nas.CORP.example", "127.0.0.1", True),
        ("nas.corp.example", "evil.nas.corp.example", "10.0.0.7", False),
        ("*.corp.example", "nas.corp.example", "10.0.0.7", True),
        ("*.corp.example", "corp.example", "10.0.0.7", False),
        ("*.corp.example", "evilcorp.example", "10.0.0.7", False),
        ("10.0.0.0/8", "any.example", "10.0.0.7", True),
        ("10.0.0.0/8", "any.example", "::ffff:10.0.0.7", True),
        ("10.0.0.0/8", "any.example", "192.168.0.1", False),
        ("10.0.0.5/8", "any.example", "10.0.0.7", True),
        ("fd00::/8", "any.example", "fd12::1", True),
        ("other.example, 10.0.0.7", "any.example", "10.0.0.7", True),
        ("all", "any.example", "10.0.0.7", True),
        # A name does not open what gives out a machine's credentials; its address does.
        ("nas.corp.example", "nas.corp.example", "169.254.169.254", False),
        ("*.corp.example", "nas.corp.example", "fd00:ec2::254", False),
        ("169.254.169.254", "nas.corp.example", "169.254.169.254", True),
        ("ALL", "nas.corp.example", "169.254.169.254", True),
    ],
)
def test_the_setting_opens_what_it_names(setting: str, host: str, address: str, opened: bool) -> None:
    environ = {"EACHLABS_BASE_URL": "https://93.184.215.14", "EACHLABS_PRIVATE_HOSTS": setting}
    account = settings_from_environment(environ, api_key="a-key")
    assert (why_not(HostGuard(account.private_hosts, account.api_host, resolve=finding(address)), host) == "") is opened


@pytest.mark.parametrize(
    "text",
    ["10.0.0.0/99", "http://nas", "nas:9000", "a b", "*", "*.", "1.2.3", "0x7f.1", "-a.example", "a..b", "nas/8"],
)
def test_a_setting_that_names_nothing_says_what_it_may_be(text: str) -> None:
    with pytest.raises(
        SetupError, match=r"EACHLABS_PRIVATE_HOSTS: .*a host name, \*\.SUFFIX, an IP address or a network"
    ):
        settings_from_environment({"EACHLABS_API_KEY": "a-key", "EACHLABS_PRIVATE_HOSTS": f"fine.example,{text}"})


# -------------------------------------------------------------------- connections, for real


class Server:
    """Serves one answer on 127.0.0.1, and keeps the requests."""

    def __init__(self, answer: bytes | Callable[[bytes], bytes], tls: ssl.SSLContext | None = None) -> None:
        self._answer, self._tls = answer, tls
        self.requests: list[bytes] = []
        self.port = self.sent_bytes = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            answer = self._answer(self.requests[-1]) if callable(self._answer) else self._answer
            await self.send(writer, answer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        writer.write(answer)
        await writer.drain()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self.port
        finally:
            server.close()
            await server.wait_closed()


class EndlessServer(Server):
    """Says the answer, then the same piece again and again, until nobody takes it any more."""

    def __init__(self, answer: bytes, piece: bytes) -> None:
        super().__init__(answer)
        self._piece = piece

    async def send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        await super().send(writer, answer)
        while self.sent_bytes < 64 * 1024 * 1024:
            writer.write(self._piece)
            await writer.drain()
            self.sent_bytes += len(self._piece)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SMALL) + SMALL


async def fetched(guard: HostGuard, url: str, **given: Any) -> bytes:
    downloader = Downloader(hosts=guard, **given)
    try:
        return (await downloader.fetch(url, prediction_id="pred-1")).data
    finally:
        await downloader.aclose()


@in_real_time
async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A name that only the guard's resolver knows is reached, and looked up once for two pictures."""
    server, resolve = Server(OK), finding("127.0.0.1", "169.254.169.254")
    guard = HostGuard("pictures.invalid", resolve=resolve)
    async with server.running() as port:
        assert await fetched(guard, f"http://pictures.invalid:{port}/1.png") == SMALL
        assert f"Host: pictures.invalid:{port}\r\n".encode() in server.requests[0]
        assert resolve.asked == ["pictures.invalid"]  # type: ignore[attr-defined]
        # The name leads elsewhere now: the next connection is not made.
        with pytest.raises(HostNotAllowed, match=r"pictures\.invalid at 169\.254\.169\.254"):
            await fetched(guard, f"http://pictures.invalid:{port}/1.png")
    assert len(server.requests) == 1


@in_real_time
async def test_an_address_that_refuses_is_passed_over_for_the_next_one() -> None:
    server = Server(OK)
    async with server.running() as port:
        for order in (["127.0.0.2", "::1", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]):
            guard = HostGuard("all", resolve=finding(order))
            assert await fetched(guard, f"http://pictures.invalid:{port}/1.png") == SMALL


@in_real_time
async def test_a_redirect_into_this_network_is_not_followed_by_name_or_number() -> None:
    targets: list[bytes] = []
    server = Server(lambda _: b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % targets[-1])
    async with server.running() as port:
        for target in (b"http://127.0.0.1:%d/x?token=secret" % port, b"//0x7f.1:%d/x" % port, b"http://[::1]/x"):
            targets.append(target)
            guard = HostGuard("pictures.invalid", resolve=finding("127.0.0.1"))
            with pytest.raises(HostNotAllowed, match="loopback") as caught:
                await fetched(guard, f"http://pictures.invalid:{port}/1.png?token=secret")
            assert "secret" not in str(caught.value)
            assert "EACHLABS_PRIVATE_HOSTS" in str(caught.value)
    assert len(server.requests) == 3


def test_a_name_that_is_not_found_is_a_failed_download_and_may_be_repeated() -> None:
    with pytest.raises(DownloadFailed, match="its name was not found") as caught:
        asyncio.run(fetched(HostGuard(), "http://nowhere.invalid/1.png"))
    assert caught.value.retryable


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's TLS for the name pictures.invalid, trusted here."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.invalid")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.invalid")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "certificate.pem").write_bytes(pem)
    (tmp_path / "both.pem").write_bytes(pem + secret)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    return context


@in_real_time
async def test_tls_is_verified_by_the_hosts_name(certificate: ssl.SSLContext) -> None:
    names: list[str | None] = []
    certificate.sni_callback = lambda _socket, name, _context: names.append(name)
    guard = HostGuard("all", resolve=finding("127.0.0.1"))
    async with Server(OK, tls=certificate).running() as port:
        assert await fetched(guard, f"https://pictures.invalid:{port}/1.png") == SMALL
        with pytest.raises(DownloadFailed, match="CERTIFICATE_VERIFY_FAILED"):
            await fetched(guard, f"https://others.invalid:{port}/1.png")
    assert names == ["pictures.invalid", "others.invalid"]


# ---------------------------------------------------------------------------------- a proxy


@in_real_time
async def test_a_proxy_gets_names_it_may_know_and_no_address_of_this_network(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server(OK)
    async with proxy.running() as port:
        # The proxy's own address is private, and may be.
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert await fetched(HostGuard(), "http://pictures.invalid/1.png") == SMALL
        assert proxy.requests[0].startswith(b"GET http://pictures.invalid/1.png HTTP/1.1\r\n")
        for url in ("http://10.0.0.7/", "http://2852039166/", "http://wiki.internal/", "http://[fd00:ec2::254]/"):
            with pytest.raises(HostNotAllowed, match="of this network alone"):
                await fetched(HostGuard(resolve=None), url)
        with pytest.raises(HostNotAllowed, match=r"10\.0\.0\.7"):
            await fetched(HostGuard(resolve=finding(["93.184.215.14", "10.0.0.7"])), "http://a.example.org/")
        assert len(proxy.requests) == 1


@in_real_time
async def test_a_proxy_does_not_see_what_is_on_this_machine_or_excepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "pictures.invalid")
    async with Server(OK).running() as port:
        assert await fetched(HostGuard(api_host="127.0.0.1"), f"http://127.0.0.1:{port}/1.png") == SMALL
        guard = HostGuard("all", resolve=finding("127.0.0.1"))
        assert await fetched(guard, f"http://pictures.invalid:{port}/1.png") == SMALL


def test_a_proxy_that_cannot_be_used_is_a_failed_download_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://user:secret-word@127.0.0.1:9")
    with pytest.raises(DownloadFailed, match="proxy") as caught:
        asyncio.run(fetched(HostGuard(), "http://pictures.invalid/1.png"))
    assert "secret-word" not in str(caught.value)


@in_real_time
async def test_what_is_looked_up_is_the_very_name_that_the_proxy_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`xn--fa-hia.de` is shown as `fa\u00df.de`, which older rules read as `fass.de`: somebody else's name."""
    resolve = finding("93.184.215.14")
    proxy = Server(OK)
    async with proxy.running() as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert await fetched(HostGuard(resolve=resolve), "http://xn--fa-hia.de/1.png") == SMALL
        assert proxy.requests[0].startswith(b"GET http://xn--fa-hia.de/1.png HTTP/1.1\r\n")
    assert resolve.asked == ["xn--fa-hia.de"]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------- what is sent back


@in_real_time
async def test_four_gigabytes_that_are_announced_are_not_read() -> None:
    server = EndlessServer(b"HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n" + SMALL[:33], bytes(65_536))
    async with server.running() as port:
        with pytest.raises(NotAPng, match="larger than"):
            await fetched(HostGuard(api_host="127.0.0.1"), f"http://127.0.0.1:{port}/1.png")
    assert server.sent_bytes < 8 * 1024 * 1024, "what the sockets hold"


@in_real_time
async def test_a_body_without_end_is_given_up_at_the_cap() -> None:
    text = b"tEXt" + b"k\0" + b"v" * 65_534
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    server = EndlessServer(b"HTTP/1.1 200 OK\r\n\r\n" + SMALL[:33], chunk)
    async with server.running() as port:
        with pytest.raises(NotAPng, match="larger than 1000000 bytes"):
            await fetched(HostGuard(api_host="127.0.0.1"), f"http://127.0.0.1:{port}/1.png", max_bytes=1_000_000)
    assert server.sent_bytes < 16 * 1024 * 1024, "what the sockets hold"


@pytest.mark.parametrize("piece", [b"x" * 65_536, b"X-More: and more\r\n" * 4_000], ids=["one header", "many"])
@in_real_time
async def test_headers_of_megabytes_are_given_up(piece: bytes) -> None:
    server = EndlessServer(b"HTTP/1.1 200 OK\r\nX-Long: ", piece)
    async with server.running() as port:
        with pytest.raises(DownloadFailed, match="RemoteProtocolError"):
            await fetched(HostGuard(api_host="127.0.0.1"), f"http://127.0.0.1:{port}/1.png")
    assert server.sent_bytes < 16 * 1024 * 1024, "what the sockets hold"


@in_real_time
async def test_interim_answers_without_end_are_given_up_in_time() -> None:
    server = EndlessServer(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1_000)
    async with server.running() as port:
        with pytest.raises(DownloadFailed, match=r"did not come in time|RemoteProtocolError"):
            await fetched(HostGuard(api_host="127.0.0.1"), f"http://127.0.0.1:{port}/1.png", window_seconds=0.3)


async def test_a_reference_picture_that_comes_encoded_is_not_inflated_to_be_looked_at() -> None:
    """Its first bytes would be made of a bomb: what the host says of it must do."""
    bomb = gzip.compress(bytes(1_000_000))
    headers = {"Content-Type": "image/png", "Content-Encoding": "gzip", "Content-Range": f"bytes 0-63/{len(bomb)}"}
    taken: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        taken.append(1)
        yield bomb

    def answer(request: httpx.Request) -> httpx.Response:
        return (
            httpx.Response(405) if request.method == "HEAD" else httpx.Response(206, headers=headers, content=pieces())
        )

    assert (await Prober(httpx.MockTransport(answer)).check("https://cdn.example.org/a.png")) == Seen(
        "image/png", len(bomb)
    )
    assert taken == []


async def put(place: str, answer: httpx.Response) -> tuple[str, bool]:
    """What becomes of an upload to where the API said."""
    settings = AccountSettings(api_key="a-key", base_url="https://93.184.215.14")  # type: ignore[arg-type]
    nobody: Any = None
    references = References(nobody, nobody, settings, nobody, httpx.MockTransport(lambda _: answer))
    try:
        return await references._put_once(UploadSlot(place, "https://cdn.example.org/a.png", {}), b"a picture")
    finally:
        await references.aclose()


def test_the_answer_to_an_upload_is_not_read() -> None:
    taken: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        while len(taken) < 1_000:
            taken.append(1)
            yield bytes(65_536)

    assert run(put("https://uploads.example.org/a", httpx.Response(200, content=endless()))) == ("", False)
    assert taken == []


def test_an_upload_goes_to_no_host_of_this_network_and_is_not_repeated() -> None:
    reason, again = run(put("https://169.254.169.254/a?X-Amz-Signature=secret", httpx.Response(200)))
    assert "169.254.169.254" in reason
    assert "EACHLABS_PRIVATE_HOSTS" in reason
    assert "secret" not in reason
    assert not again


# --------------------------------------------------------------------------- what it costs


async def test_a_picture_at_a_refused_host_is_paid_for_once_kept_by_its_record_and_had_when_it_is_allowed() -> None:
    api = InProcessTransport(
        EmulatorOptions(
            requests_per_minute=None,
            service_seconds=1.0,
            pictures="plain",
            image_size_px=16,
            public_url="http://169.254.169.254",
            picture_query="?X-Amz-Signature=abcdef",
        )
    )
    store, settings = MemoryStore(), AccountSettings(api_key="a-key", base_url="https://api.invalid")  # type: ignore[arg-type]

    def engine(private_hosts: str) -> Engine:
        guard = HostGuard(private_hosts, settings.api_host, resolve=None)
        return Engine(
            settings,
            local_limiter(requests_per_minute=None, max_in_flight=None),
            lambda _destination, _access: store,
            client=EachlabsClient(settings, transport=api),
            downloader=Downloader(api, hosts=guard),
        )

    async def buy(private_hosts: str) -> Any:
        item, options = Item.wanted("a fox", item_id="fox"), PurchaseOptions(run_id="run")
        return await engine(private_hosts).generate_and_store(item, Destination.parse("s3://bucket/p"), options=options)

    before = asyncio.get_running_loop().time()
    with pytest.raises(HostNotAllowed, match=r"169\.254\.169\.254.*paid for.*EACHLABS_PRIVATE_HOSTS") as caught:
        await buy("")
    assert "abcdef" not in str(caught.value)
    assert caught.value.item_id == "fox"
    assert store.json("p/records/fox.json")["state"] == RecordState.CREATED.value
    assert asyncio.get_running_loop().time() - before < 60
    image = await buy("169.254.169.254")
    assert image.prediction_id == caught.value.prediction_id
    assert api.emulator.tallies()["billed"] == 1
