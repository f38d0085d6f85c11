"""What can be set about the emulator, each number within its bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefect_eachlabs.testing.emulator.faults import Fault, parse_faults


class EmulatorOptions(BaseModel):
    """How the emulator behaves; the defaults are what the model's page says.

    Attributes:
        service_seconds: Mean time from POST to end. `spread` is its relative standard deviation; the time stays
            between a fifth and three times the mean.
        seed: Makes service times and faults the same in each run (by the order of the calls).
        requests_per_minute: At most so many `/v1` requests of a key in any 60 s, else 429; None: no limit.
        max_in_flight: At most so many predictions of a key between POST and end, else 429; None: no limit.
        count_rejected: Whether requests answered by 429 count against `requests_per_minute` too.
        retry_after: What a 429 says in `Retry-After`: nothing, seconds, or an HTTP date.
        api_keys: The keys that are good; None: any that is not empty.
        cost_usd: What a picture costs. Failed and cancelled predictions cost nothing.
        settle_seconds: `metrics.cost` says 0 until so long after the end.
        balance_usd: What the account may spend: a POST that it does not cover gets a 402; None: no end of money.
        image_size_px: Width and height of the pictures.
        pictures: `drawn` shows the prompt; `plain` is quick, for benchmarks.
        picture_query: Appended to the pictures' URLs, as a signature would be.
        public_url: Where others reach this server; None: the host that the request was sent to.
        webhooks: Whether predictions call their `webhook_url`: `newest` and `older` in the vendor's texts' forms of the
            body, `none` never, and has no list of them.
        webhook_retry_seconds: So long after an attempt that was not acknowledged comes the next, of three.
        long_poll_seconds: A GET of an unfinished prediction is held until the end or so long; 0: never.
        clock_skew_seconds: The vendor's dates are off by so much.
        listing_delay_seconds: Executions shows the world as it was so long ago.
        total_cap: `total_count` of executions is counted up to here.
        strict_models: Whether a POST for a model outside the catalogue is refused (404), and its input checked
            against the model's schema (400).
        require_version: Whether a POST without `version` is refused, as the API of 2025 did.
        keep_requests: The journal holds the last so many requests.
        keep_predictions: The oldest ended predictions beyond so many are forgotten (their tallies stay).
        faults: What goes wrong; see `Fault`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    service_seconds: Annotated[float, Field(ge=0, le=86_400)] = 5.0
    spread: Annotated[float, Field(ge=0, le=2)] = 0.2
    seed: int = 0
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = 60
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] | None = 10
    count_rejected: bool = False
    retry_after: Literal["none", "seconds", "date"] = "none"
    api_keys: frozenset[str] | None = Field(default=None, repr=False)
    cost_usd: Annotated[float, Field(ge=0, le=1_000)] = 0.039
    settle_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    balance_usd: Annotated[float, Field(ge=0)] | None = None
    image_size_px: Annotated[int, Field(ge=16, le=4_096)] = 512
    pictures: Literal["drawn", "plain"] = "drawn"
    picture_query: str = ""
    public_url: str | None = None
    webhooks: Literal["newest", "older", "none"] = "newest"
    webhook_retry_seconds: Annotated[float, Field(ge=0, le=3_600)] = 10.0
    long_poll_seconds: Annotated[float, Field(ge=0, le=3_600)] = 0.0
    clock_skew_seconds: Annotated[float, Field(ge=-31_536_000, le=31_536_000)] = 0.0
    listing_delay_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    total_cap: Annotated[int, Field(ge=1)] = 1_000
    strict_models: bool = True
    require_version: bool = False
    keep_requests: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000
    keep_predictions: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000
    faults: tuple[Fault, ...] = ()

    @field_validator("faults", mode="before")
    @classmethod
    def _faults_may_be_text(cls, faults: object) -> object:
        return parse_faults(faults)
