"""What people write into forms, the environment and addresses: read, or refused by name."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

import httpx
from hypothesis import strategies as st

from prefect_eachlabs.api.client import EachlabsClient
from prefect_eachlabs.errors import BadInput, HostNotAllowed, NotYetSafe, SetupError
from prefect_eachlabs.flows.schedule import filled, zone
from prefect_eachlabs.images.download import Downloader
from prefect_eachlabs.models import Destination, is_http_url
from prefect_eachlabs.net.public_only import (
    GuardedTransport,
    HostGuard,
    HostRefused,
    address_in,
    host_as_written,
    is_loopback,
    not_public,
    parse_private_hosts,
)
from prefect_eachlabs.reference_images import Roots
from prefect_eachlabs.settings import ENVIRONMENT, AccountSettings, settings_from_environment
from tests.fuzz import hostile
from tests.fuzz.kit import fuzzed, says
from tests.virtual_time import run

DATE = datetime(2026, 11, 22, 10, 0, tzinfo=timezone.utc)
words = st.lists(
    st.sampled_from(
        (
            *("{", "}", "{{", "}}", "{date}", "{date:", "%A", "%Y", "%", "%%", "%-d", "%s", "{0}", "{a.b}", "{a[0]}"),
            *("{date!r}", "{ date }", "{a}", ":>99999999", "\0", "\ud800"),
        )
    )
    | hostile.texts,
    max_size=6,
).map("".join)


@fuzzed(words)
def test_a_template_is_filled_or_refused(template: str) -> None:
    try:
        assert len(filled(template, DATE, name="prompt")) <= 40_000 + len(template)
    except BadInput as error:
        says(error, "prompt")


@fuzzed(
    hostile.texts
    | st.sampled_from(
        ("Europe", "zone.tab", "tzdata.zi", "posixrules", "Europe/../Europe/Berlin", "UTC/", "C:\\UTC", "./UTC")
    )
)
def test_a_time_zone_is_one_or_refused(name: str) -> None:
    try:
        DATE.astimezone(zone(name))
    except BadInput as error:
        says(error, "time_zone")


HOSTS = (
    *("127.0.0.1", "localhost", "[::1]", "[::1%25lo]", "api.eachlabs.ai", "evil.invalid", "127.1", "0x7f.1"),
    *("2130706433", "169.254.169.254", "[::ffff:169.254.169.254]", "10.0.0.1", "l%6fcalhost"),
    *("127.0.0.1%2e.evil.invalid", "8.8.8.8", "8.8.8.8%2f", "①②⑦.⓪.⓪.①", "xn--", "xn--a", "a..b", "."),
    *("a" * 64 + ".invalid", "a_b.invalid", "exa mple.invalid", "127.0.0.1.", "evil.invalid[::1]"),
    *("[::1].evil.invalid", "user:pw@127.0.0.1", "127.0.0.1:80@evil.invalid", "127.0.0.1\\@evil.invalid"),
    *("evil.invalid#@127.0.0.1", "127.0.0.1;evil.invalid", "ⓛocalhost", "[fe80::1%eth0]", "0", "", "%00"),
    *("127.0.0.1\t.evil.invalid", "[v1.x]", "256.256.256.256", "1.2.3", "[2002:7f00:1::]", "[64:ff9b::a9fe:a9fe]"),
)


@st.composite
def urls(draw: Any) -> str:
    scheme = draw(st.sampled_from(("http", "https", "HTTPS", "http", "ftp", "file", "", " https", "ht\ttp")))
    slashes = draw(st.sampled_from(("://", "://", "://", ":", ":/", ":///", "//", ":\\\\")))
    port = draw(st.sampled_from(("", "", ":80", ":0", ":99999", ":-1", ":\uff18\uff10", ":80:80", ": 80")))
    tail = draw(st.sampled_from(("", "/", "/v1", "?x=1", "#f", "/\r\nX: y", "/\ud800", "/%", "\\", "/../..", "/a b")))
    return f"{scheme}{slashes}{draw(st.sampled_from(HOSTS) | hostile.texts)}{port}{tail}"


@fuzzed(
    st.dictionaries(
        st.sampled_from(sorted(ENVIRONMENT.values())),
        hostile.texts
        | urls()
        | st.sampled_from(
            (
                *("none", "bearer", "1", "60", "0.5", "s3://bucket", "/tmp:s3://b", "10.0.0.0/8,*.lan", "all", "nan"),
                *("inf", "1_0"),
            )
        ),
        max_size=4,
    ),
    urls(),
)
def test_the_environment_makes_an_account_that_works_or_names_the_variable(
    environment: dict[str, str], url: str
) -> None:
    environment = {"EACHLABS_API_KEY": "sk-0123456789-key", "EACHLABS_BASE_URL": url, **environment}
    try:
        account = settings_from_environment(environment)
    except SetupError as error:
        says(error, "EACHLABS_", never="sk-0123456789-key")
        return

    async def story() -> None:
        # The host that one parser saw is the host that the other connects to: on it depends where the key goes.
        client = EachlabsClient(account)
        connected = client._http.base_url
        HostGuard(account.private_hosts, account.api_host)
        assert connected.scheme == "https" or is_loopback(connected.host.strip("[]"))
        seen = urlsplit(account.base_url).hostname or ""
        assert connected.raw_host.decode() == httpx.URL(scheme="https", host=seen).raw_host.decode()
        await client.aclose()

    run(story())


@fuzzed(hostile.texts | urls() | st.sampled_from(HOSTS))
def test_settings_of_places_are_read_or_refused(text: str) -> None:
    for parse, refusal in ((parse_private_hosts, ValueError), (Roots.parse, ValueError), (Destination.parse, BadInput)):
        try:
            parse(text)
        except refusal as error:
            says(error)


@fuzzed(urls(), st.lists(st.sampled_from(("8.8.8.8", "10.0.0.1", "::1", "fe80::1%lo", "x")), max_size=3))
def test_no_url_of_a_picture_is_asked_for_within_this_network(url: str, addresses: list[str]) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(302, headers={"Location": "http://[::1]/"})

    unknown: set[str] = set()

    async def resolve(host: str) -> list[str]:
        try:
            host.encode("idna")
        except UnicodeError:
            unknown.add(host)
            raise
        if not addresses:
            raise OSError("no such name")
        return addresses

    async def story() -> None:
        guard = HostGuard(resolve=resolve)
        downloader = Downloader(GuardedTransport(guard, httpx.MockTransport(answer)))
        refused = False
        try:
            await downloader.fetch(url, prediction_id="p-1")
        except NotYetSafe as error:
            says(error)
            refused = isinstance(error, HostNotAllowed)
        finally:
            await downloader.aclose()
        assert refused or not asked
        for host in {request.url.host for request in asked}:
            literal = address_in(host)
            if literal is None:
                # What cannot be looked up from here is left to the proxy that looks it up.
                assert not addresses or set(addresses) == {"8.8.8.8"} or host_as_written(host) in unknown
            else:
                assert not list(not_public(literal))
            assert "%" not in host, "a proxy may decode what was not decoded here"
        with contextlib.suppress(HostRefused, OSError, UnicodeError):
            await guard.addresses(urlsplit(url).hostname or "" if is_http_url(url) else url)

    run(story())


def test_every_variable_of_an_account_is_fuzzed() -> None:
    assert set(ENVIRONMENT) == set(AccountSettings.model_fields)
