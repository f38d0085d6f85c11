"""Blocks: who buys (`EachlabsCredentials`) and where pictures go (`S3Destination`)."""

from __future__ import annotations

import importlib
import os
import re
import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, cast

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, field_validator, model_validator

from prefect_eachlabs.engine.runtime import Gateway, gateway_for
from prefect_eachlabs.errors import BadInput, SetupError, without_query
from prefect_eachlabs.limits.prefect_leases import limiter_for
from prefect_eachlabs.models import Destination
from prefect_eachlabs.net.endpoints import checked_endpoint
from prefect_eachlabs.reference_images import DESTINATIONS_VARIABLE, Roots
from prefect_eachlabs.settings import (
    MOST_IN_FLIGHT,
    MOST_REQUESTS_PER_MINUTE,
    AccountSettings,
    AuthScheme,
    check_base_url,
    check_webhook_url,
    destination_from_environment,
    settings_from_environment,
)
from prefect_eachlabs.storage.s3_client import S3Access

Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A field that may be left empty. The UI shows `str | None` as a choice between two forms; this is one text field."""


class EachlabsCredentials(CredentialsBlock):
    """An account at Eachlabs: its API key and its limits.

    What is left empty comes from the environment (`EACHLABS_...`), then from the model's page.

    Example:
        Tasks and flows take the block, or its name:

        ```python
        from prefect_eachlabs import EachlabsCredentials, create_prediction

        credentials = EachlabsCredentials.load("BLOCK_NAME")
        create_prediction("a red fox", destination="s3://acme/daily", credentials=credentials)
        ```
    """

    _block_type_name: ClassVar[str] = "Eachlabs Credentials"
    _block_type_slug: ClassVar[str] = "eachlabs-credentials"
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://docs.eachlabs.ai")
    # No logo: Prefect takes http(s) URLs alone, which the browser of whoever opens the page would load.

    api_key: SecretStr = Field(title="API key", description="The key from eachlabs.ai; sent to the API's host alone.")
    base_url: Annotated[Text, AfterValidator(lambda url: check_base_url(url) if url else "")] = Field(
        default="",
        title="Base URL",
        description="Where the API is: https, or http on loopback. Empty: EACHLABS_BASE_URL, then https://api.eachlabs.ai.",
    )
    auth_scheme: AuthScheme | None = Field(
        default=None, title="Authentication", description="The header that carries the key. Empty: x-api-key."
    )
    account: Text = Field(
        default="",
        title="Account",
        description="Names the limits that workers share on this server. Empty: default.",
        pattern=r"^[A-Za-z0-9_-]{0,64}$",
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=0,
        le=MOST_REQUESTS_PER_MINUTE,
        title="Requests a minute",
        description="At most so many requests in any 60 s; 0: no limit. Empty: 60, as the model's page says.",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=0,
        le=MOST_IN_FLIGHT,
        title="Predictions in flight",
        description="At most so many predictions at a time; 0: no limit. Empty: 10, as the model's page says.",
    )

    webhook_url: Annotated[Text, AfterValidator(check_webhook_url)] = Field(
        default="",
        title="Webhook URL",
        description="Where the vendor calls when a prediction has ended: https. Empty: EACHLABS_WEBHOOK_URL, then "
        "nowhere; ends are asked for.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        title="Webhook secret",
        description="At least 16 characters, the same as the receiver's. Empty: EACHLABS_WEBHOOK_SECRET.",
    )

    def account_settings(self) -> AccountSettings:
        """The account: these fields, then the environment, then the defaults.

        Raises:
            SetupError: A setting is out of bounds.
        """
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        given: dict[str, Any] = {name: value or None for name, value in fields if value or value == 0}  # 0: no limit
        return settings_from_environment(**{"api_key": self.api_key, **given})

    def get_client(self, *args: Any, **kwargs: Any) -> Gateway:
        """The process's gateway of this account."""
        return gateway_of(self)


class S3Destination(Block):
    """Where pictures, records and reports go: a bucket, a prefix, and how to get in.

    What is left empty is boto3's own: `AWS_*`, shared profiles, instance roles.

    Example:
        Tasks take the block; a flow's form takes `eachlabs-s3-destination/BLOCK_NAME`:

        ```python
        from prefect_eachlabs import S3Destination, generate_and_store

        destination = S3Destination.load("BLOCK_NAME")
        generate_and_store("a red fox", destination=destination)
        ```
    """

    _block_type_name: ClassVar[str] = "Eachlabs S3 Destination"
    _block_type_slug: ClassVar[str] = "eachlabs-s3-destination"
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html"
    )

    bucket: str = Field(title="Bucket", description="The bucket's name; it must exist.", min_length=3, max_length=255)
    prefix: str = Field(default="", title="Prefix", description="Folder in the bucket.", max_length=700)
    region: Text = Field(default="", title="Region", description="Such as eu-central-1. Empty: boto3's own.")
    endpoint_url: Text = Field(
        default="",
        title="Endpoint",
        description="For stores that are not AWS; with an access key of its own, or the same as the workers' own "
        "AWS_ENDPOINT_URL_S3. Empty: AWS_ENDPOINT_URL_S3, then AWS.",
    )
    aws_credentials_block: Text = Field(
        default="",
        title="AWS Credentials block",
        description="The name of an AWS Credentials block, or minio-credentials/NAME (prefect-aws must be installed "
        "where runs run). Empty: the access key below, then boto3's own chain.",
    )
    access_key_id: Text = Field(default="", title="Access key id", description="Empty: boto3's own chain.")
    secret_access_key: SecretStr | None = Field(
        default=None, title="Secret access key", description="Goes with the access key id."
    )
    session_token: SecretStr | None = Field(
        default=None, title="Session token", description="For temporary credentials, which end."
    )
    kms_key_id: Text = Field(default="", title="KMS key", description="Encrypts every object with this key (SSE-KMS).")
    storage_class: Text = Field(
        default="", title="Storage class", description="For the pictures alone, such as STANDARD_IA."
    )

    @field_validator("endpoint_url")
    @classmethod
    def _an_endpoint(cls, url: str) -> str:
        # Whether it may be used is for the machine that uses it to say: `checked_endpoint`.
        if url and not url.startswith(("https://", "http://")):
            raise ValueError("the endpoint must be https://HOST or http://HOST")
        return url

    @model_validator(mode="after")
    def _one_way_in(self) -> S3Destination:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError("access key id and secret access key go together: give both, or neither")
        if self.aws_credentials_block and self.access_key_id:
            raise ValueError("give an AWS Credentials block or an access key, not both")
        return self

    def destination(self) -> Destination:
        """The place it names.

        Raises:
            BadInput: The bucket's name or the prefix is not one.
        """
        return Destination.parse(f"s3://{self.bucket}/{self.prefix}")

    def access(self) -> S3Access:
        """How to get in.

        Raises:
            SetupError: It names a block that is not there, or prefect-aws is not installed here; or its endpoint may
                not be used from here.
        """
        secret, token = self.secret_access_key, self.session_token
        if self.aws_credentials_block:
            found, has_keys = access_of_block(self.aws_credentials_block)
        else:
            has_keys = bool(self.access_key_id)
            found = S3Access(
                access_key_id=self.access_key_id or None,
                secret_access_key=secret.get_secret_value() if secret else None,
                session_token=token.get_secret_value() if token else None,
            )
        url = self.endpoint_url or found.endpoint_url or ""
        try:
            endpoint_url = checked_endpoint(url, has_keys=has_keys)
        except ValueError as error:
            raise SetupError(
                f"The S3 destination's block names its own endpoint {without_query(url)}: {error}. Nothing was bought."
            ) from None
        return replace(
            found,
            endpoint_url=endpoint_url,
            region=self.region or found.region,
            kms_key_id=self.kms_key_id or None,
            storage_class=self.storage_class or None,
        )


def access_of_block(name: str) -> tuple[S3Access, bool]:
    """What a block of prefect-aws gives: keys, region, endpoint; and whether the keys are its own.

    They are not where it names a profile or nothing: then they are this machine's, and those of a role of this moment.

    Args:
        name: Of an `AwsCredentials` block; or `minio-credentials/NAME`.

    Raises:
        SetupError: prefect-aws is not installed, or there is no such block.
    """
    try:
        aws = importlib.import_module("prefect_aws.credentials")
    except ImportError as error:
        raise SetupError(
            f"The S3 destination names the block {name!r}, which needs prefect-aws here: "
            "pip install 'prefect-eachlabs[aws]', or give the access key in the destination's block."
        ) from error
    kind = aws.MinIOCredentials if name.startswith("minio-credentials/") else aws.AwsCredentials
    block = load_block(name, kind)
    session = block.get_boto3_session()
    keys = session.get_credentials()
    frozen = keys.get_frozen_credentials() if keys is not None else None
    has_keys = bool(getattr(block, "aws_access_key_id", None) or getattr(block, "minio_root_user", None))
    access = S3Access(
        endpoint_url=block.aws_client_parameters.endpoint_url or None,
        region=session.region_name,
        access_key_id=frozen.access_key if frozen else None,
        secret_access_key=frozen.secret_key if frozen else None,
        session_token=frozen.token if frozen else None,
    )
    return access, has_keys


_BLOCK_NAME = re.compile(r"[a-z0-9-]{1,200}")
LOADED_FOR_SECONDS = 60.0
_loaded: dict[str, tuple[float, Block]] = {}


def load_block(name: str, kind: type[Block]) -> Any:
    """A saved block by its name; asked of the server at most once a minute, for each call emits events.

    Raises:
        BadInput: It cannot be a block's name: the server would be asked for something else, another type's block, say.
        SetupError: There is no such block; says how to make one.
    """
    name = name.removeprefix(f"{kind.get_block_type_slug()}/")
    if not _BLOCK_NAME.fullmatch(name):
        raise BadInput(f"{name[:140]!r} is not the name of a block: names are of a to z, 0 to 9 and -.")
    key = f"{kind.__name__}/{name}"
    found = _loaded.get(key)
    if found is not None and time.monotonic() - found[0] < LOADED_FOR_SECONDS:
        return found[1]
    try:
        block = kind.load(name, _sync=True)  # type: ignore[call-arg]  # the sync form of a method that is both
    except ValueError:
        raise SetupError(
            f"There is no block {kind.get_block_type_slug()}/{name} on the Prefect server: save one in the UI under "
            "Blocks, or run `prefect-eachlabs setup`. Nothing was bought."
        ) from None
    except Exception as error:  # its text and traceback may hold what the block keeps secret
        raise SetupError(
            f"The block {kind.get_block_type_slug()}/{name} cannot be read ({type(error).__name__}): see that the "
            "Prefect server answers, or save it again in the UI under Blocks. Nothing was bought."
        ) from None
    assert isinstance(block, kind)
    _loaded[key] = (time.monotonic(), block)
    return block


def gateway_of(credentials: EachlabsCredentials | str | None) -> Gateway:
    """The process's gateway of an account: of a block, of a block's name, or of the environment.

    Its places are leased from the Prefect server's global limits where one is configured.

    Raises:
        SetupError: No key, no such block, or a setting out of bounds.
    """
    if isinstance(credentials, str) and credentials:
        credentials = load_block(credentials, EachlabsCredentials)
    settings = credentials.account_settings() if isinstance(credentials, EachlabsCredentials) else None
    return gateway_for(settings, make_limiter=limiter_for)


def where(destination: S3Destination | Destination | str | None) -> tuple[Destination, S3Access | None]:
    """A destination and how to get in: of a block, of `eachlabs-s3-destination/NAME` of a saved one, or of
    `s3://bucket/prefix`; the environment's when none is named.

    For tasks and flows, which may write where EACHLABS_DESTINATIONS says, and anywhere when it is not set.

    Raises:
        BadInput: It is none of these, or runs may not write there.
        SetupError: None is named here, and none in the environment; there is no such block; or EACHLABS_DESTINATIONS
            cannot be read.
    """
    if isinstance(destination, str):
        destination = destination.strip()
    destination = destination or destination_from_environment()
    if isinstance(destination, str) and destination.startswith(f"{S3Destination.get_block_type_slug()}/"):
        destination = cast(S3Destination, load_block(destination, S3Destination))
    if isinstance(destination, S3Destination):
        return _writable(destination.destination()), destination.access()
    return _writable(Destination.parse(destination)), None


def _writable(place: Destination) -> Destination:
    setting = os.environ.get(DESTINATIONS_VARIABLE, "").strip()
    if not setting:
        return place
    try:
        allowed = Roots.parse(setting)
    except ValueError as error:
        raise SetupError(f"{DESTINATIONS_VARIABLE} cannot be read: {error}. Nothing was bought.") from None
    if not allowed.allow_object(place.bucket, place.key("images")):
        raise BadInput(
            f"destination: runs may not write to {place}: {DESTINATIONS_VARIABLE} on the machine that runs this does "
            "not name it. Nothing was bought."
        )
    return place
