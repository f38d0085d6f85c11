"""The account and its limits, from the environment or a block, each number within its bounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.net.public_only import is_loopback, parse_private_hosts
from prefect_eachlabs.net.urls import has_odd_host
from prefect_eachlabs.reference_images import Roots

AuthScheme = Literal["x-api-key", "bearer"]

DEFAULT_BASE_URL = "https://api.eachlabs.ai"
DESTINATION_VARIABLE = "EACHLABS_DESTINATION"
MOST_REQUESTS_PER_MINUTE, MOST_IN_FLIGHT = 100_000, 10_000
SHORTEST_WEBHOOK_SECRET_CHARACTERS = 16
NEEDED_SECRET = (
    "EACHLABS_WEBHOOK_SECRET, without which nobody's call can be believed: "
    "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
)


def check_base_url(url: str, *, what: str = "base URL") -> str:
    """The URL without its trailing slash: https, or http on loopback (emulators), nothing else.

    Raises:
        ValueError: Another scheme, a plain http host that is not loopback, or user info or a query in it.
    """
    if has_odd_host(url):
        raise ValueError(f"the {what} is no URL: its host is longer than any")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
        connected = httpx.URL(url.strip()).host
    except (ValueError, httpx.InvalidURL) as error:
        raise ValueError(f"the {what} is no URL: {error}") from None
    if parts.scheme not in ("https", "http") or not host:
        raise ValueError(f"the {what} must be https://HOST (or http:// on loopback)")
    if connected.lower() != host.lower():
        # What is checked here must be the host that the key goes to.
        raise ValueError(f"the {what}'s host can be read in two ways: write it plainly")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(f"the {what} must be https: the key would travel in clear (http is for loopback only)")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"the {what} must hold no user info, query or fragment")
    return url.strip().rstrip("/")


def check_webhook_url(url: str) -> str:
    """As `check_base_url`; empty is none."""
    return check_base_url(url, what="webhook URL") if url.strip() else ""


def _check_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value().strip()
    if not text or not text.isascii() or not text.isprintable():
        raise ValueError("the key must be printable ASCII and not empty")
    return SecretStr(text)


def check_webhook_secret(secret: SecretStr) -> SecretStr:
    """The secret that orders' secrets are made of, without white space around it; empty is none.

    Raises:
        ValueError: It is shorter than 16 characters, or not printable ASCII.
    """
    text = secret.get_secret_value().strip()
    if not text:
        return SecretStr("")
    if len(text) < SHORTEST_WEBHOOK_SECRET_CHARACTERS or not text.isascii() or not text.isprintable():
        raise ValueError(
            f"the webhook secret must be at least {SHORTEST_WEBHOOK_SECRET_CHARACTERS} printable ASCII characters"
        )
    return SecretStr(text)


def host_and_port(text: str) -> tuple[str, int]:
    """`HOST:PORT`, the host of an IPv6 address in brackets.

    Raises:
        ValueError: It is something else.
    """
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError("where to listen must be HOST:PORT, such as 0.0.0.0:8800")
    return host, int(port)


def _readable_by(read: Callable[[str], object]) -> Callable[[str], str]:
    """A validator: the text, which `read` takes without a ValueError; empty is none."""

    def check(text: str) -> str:
        if text := text.strip():
            read(text)
        return text

    return check


class AccountSettings(BaseModel):
    """An account at Eachlabs: the key, where it is good, its two limits, and the times of the purchase protocol.

    Attributes:
        api_key: The key; sent to the host of `base_url` alone.
        base_url: https, or http on loopback.
        auth_scheme: `x-api-key` (header `X-API-Key`) or `bearer` (header `Authorization`).
        requests_per_minute: At most so many requests in any 60 s; None: no limit. The model's page says 60.
        max_in_flight: At most so many predictions between POST and end; None: no limit. The model's page says 10.
        account: Names the account's shared limits on a Prefect server.
        claim_seconds: A claim older than this, by the bucket's clock, is dead and may be taken over.
        settling_seconds: An abandoned POST creates nothing later than this, and what it created is listed by then.
        deadline_seconds: From the POST until an unfinished prediction counts as timed out.
        conditional_writes: `require`; or `ignore`, for a store without them and one worker at a time, at your own risk.
        reference_roots: Folders and `s3://bucket/prefix`, separated by colons, from which flows, tasks and rows of
            tables may read reference pictures, and flows their tables; empty: none, but what lies below a saved
            S3Destination block that a run writes to.
        check_references: Whether reference pictures are looked at (reachable, small enough, a picture) before money
            is spent.
        private_hosts: Host names, `*.suffix`, IP addresses and networks, separated by commas, from which pictures may
            be fetched although they are of this network alone; or `all`; empty: none, unless the API is there too.
        webhook_url: Where the vendor calls when a prediction has ended: https, or http on loopback; empty: nowhere,
            ends are asked for.
        webhook_secret: What each order's own secret is made of; at least 16 characters, the same for all workers and
            receivers of the account.
        webhook_listen: `HOST:PORT` at which this process receives the calls itself; empty: they come as events of
            the Prefect server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: Annotated[SecretStr, AfterValidator(_check_key)]
    base_url: Annotated[str, AfterValidator(check_base_url)] = DEFAULT_BASE_URL
    auth_scheme: AuthScheme = "x-api-key"
    requests_per_minute: Annotated[int, Field(ge=1, le=MOST_REQUESTS_PER_MINUTE)] | None = 60
    max_in_flight: Annotated[int, Field(ge=1, le=MOST_IN_FLIGHT)] | None = 10
    account: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "default"
    claim_seconds: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    settling_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    conditional_writes: Literal["require", "ignore"] = "require"
    reference_roots: Annotated[str, AfterValidator(_readable_by(Roots.parse))] = ""
    check_references: Literal["yes", "no"] = "yes"
    private_hosts: Annotated[str, AfterValidator(_readable_by(parse_private_hosts))] = ""
    webhook_url: Annotated[str, AfterValidator(check_webhook_url)] = ""
    webhook_secret: Annotated[SecretStr, AfterValidator(check_webhook_secret)] = SecretStr("")
    webhook_listen: Annotated[str, AfterValidator(_readable_by(host_and_port))] = ""

    @model_validator(mode="after")
    def _webhooks_have_a_secret(self) -> AccountSettings:
        if self.webhook_url and not self.webhook_secret:
            raise ValueError(f"EACHLABS_WEBHOOK_URL needs {NEEDED_SECRET}")
        return self

    @property
    def post_begins_within_seconds(self) -> float:
        """How long after its claim was sent a POST may begin (10 s at the default claim of 60 s)."""
        return min(10.0, self.claim_seconds / 6)

    @property
    def api_host(self) -> str:
        """The host of `base_url`, as a request names it, where it is loopback or this machine's environment names it.

        Empty otherwise: beside it pictures may be of this network, which neither a block's host nor the vendor's own
        opens by what its DNS says at one moment or another.
        """
        host = httpx.URL(self.base_url).raw_host.decode("ascii")
        named = os.environ.get(ENVIRONMENT["base_url"], "").strip().rstrip("/")
        return host if is_loopback(host) or DEFAULT_BASE_URL != named == self.base_url else ""

    @property
    def post_given_up_after_seconds(self) -> float:
        """How long a POST may take (30 s at the default claim of 60 s)."""
        return min(30.0, self.claim_seconds / 2)

    @property
    def freeze_margin_seconds(self) -> float:
        """How long a process may freeze between a check and what it sends (20 s at the default claim of 60 s)."""
        return min(20.0, self.claim_seconds / 3)


ENVIRONMENT = {field: f"EACHLABS_{field.upper()}" for field in AccountSettings.model_fields}
"""Field of `AccountSettings` → environment variable."""


def destination_from_environment() -> str:
    """Where pictures and records go when a call names no destination: `EACHLABS_DESTINATION`.

    Raises:
        SetupError: It is not set. Without a destination there is no record, and nothing is bought without one.
    """
    text = os.environ.get(DESTINATION_VARIABLE, "").strip()
    if not text:
        raise SetupError(
            "No destination: name one (destination='s3://bucket/prefix', --to s3://bucket/prefix) or set "
            f"{DESTINATION_VARIABLE}. Its record is what keeps a picture from being bought twice. Nothing was bought."
        )
    return text


def settings_from_environment(environ: Mapping[str, str] | None = None, **given: Any) -> AccountSettings:
    """The account as the environment describes it; `given` (the fields of a block, say) wins over it.

    Costs nothing and sends nothing.

    Raises:
        SetupError: No key anywhere, or a value out of its bounds; says which variable and what it may be.
    """
    environ = os.environ if environ is None else environ
    found = {field: environ.get(variable, "").strip() for field, variable in ENVIRONMENT.items()}
    values: dict[str, Any] = {field: text for field, text in found.items() if text}
    for field in ("requests_per_minute", "max_in_flight"):
        if found[field].lower() == "none":
            values[field] = None
    for field in {"auth_scheme", "conditional_writes", "check_references"} & values.keys():
        values[field] = found[field].lower()
    values.update(given)
    if not values.get("api_key"):
        raise SetupError(
            "No API key. Set EACHLABS_API_KEY (your key from eachlabs.ai), or save an EachlabsCredentials block "
            "and pass its name as credentials. Nothing was bought."
        )
    try:
        return AccountSettings(**values)
    except ValidationError as error:
        faults = faults_in(error, lambda field: ENVIRONMENT.get(field, field or "settings"))
        raise SetupError(f"A setting is out of bounds: {faults}. Nothing was bought.") from None


def faults_in(error: ValidationError, name_of: Callable[[str], str] = lambda field: field or "block") -> str:
    """What pydantic refuses, a field after the other; no value, which may be a secret."""
    return "; ".join(
        f"{name_of(str(fault['loc'][0]) if fault['loc'] else '')}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_input=False, include_url=False)
    )
