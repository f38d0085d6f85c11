"""An account's settings: from the environment or a block, each within its bounds, the key never shown."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_eachlabs.errors import SetupError
from prefect_eachlabs.settings import ENVIRONMENT, AccountSettings, settings_from_environment

KEY = "sk-very-secret-0123456789"


def test_without_anything_but_a_key_the_settings_are_those_of_the_models_page() -> None:
    settings = settings_from_environment({"EACHLABS_API_KEY": KEY})
    assert settings.api_key.get_secret_value() == KEY
    assert settings.base_url == "https://api.eachlabs.ai"
    assert settings.auth_scheme == "x-api-key"
    assert (settings.requests_per_minute, settings.max_in_flight) == (60, 10)
    assert settings.account == "default"
    assert (settings.claim_seconds, settings.settling_seconds, settings.deadline_seconds) == (60, 60, 300)
    assert settings.conditional_writes == "require"


def test_every_setting_has_a_variable() -> None:
    assert set(ENVIRONMENT) == set(AccountSettings.model_fields)
    assert len(set(ENVIRONMENT.values())) == len(ENVIRONMENT)


def test_the_variables_of_an_account_and_of_a_purchase_are_read() -> None:
    given: dict[str, tuple[str, object]] = {
        "base_url": ("http://127.0.0.1:8700/", "http://127.0.0.1:8700"),
        "auth_scheme": ("Bearer", "bearer"),
        "requests_per_minute": ("none", None),
        "max_in_flight": ("NONE", None),
        "account": ("team-a", "team-a"),
        "claim_seconds": ("30", 30.0),
        "settling_seconds": ("0", 0.0),
        "deadline_seconds": ("12.5", 12.5),
        "conditional_writes": ("IGNORE", "ignore"),
    }
    environ = {ENVIRONMENT[field]: text for field, (text, _) in given.items()}
    settings = settings_from_environment({**environ, "EACHLABS_API_KEY": f"  {KEY}\n"})
    expected = {field: value for field, (_, value) in given.items()}
    assert settings.model_dump(include=set(expected)) == expected
    assert settings.api_key.get_secret_value() == KEY


def test_what_is_given_wins_over_the_environment() -> None:
    settings = settings_from_environment({"EACHLABS_API_KEY": "other", "EACHLABS_ACCOUNT": "a"}, api_key=KEY)
    assert settings.api_key.get_secret_value() == KEY
    assert settings.account == "a"


@pytest.mark.parametrize("environ", [{}, {"EACHLABS_API_KEY": "   "}])
def test_without_a_key_it_says_where_to_put_one(environ: dict[str, str]) -> None:
    with pytest.raises(SetupError, match="EACHLABS_API_KEY"):
        settings_from_environment(environ)


OUT_OF_BOUNDS = {
    "EACHLABS_API_KEY": ("with a\nline", "schlüssel"),
    "EACHLABS_BASE_URL": (
        *("http://api.eachlabs.ai", "ftp://api.eachlabs.ai", "https://user:pw@api.eachlabs.ai", "https://"),
        *("https://api.eachlabs.ai?key=1", "http://127.0.0.1.evil.example", "http://localhost.evil.example"),
        *("https://host:99999", "https://[::1"),
    ),
    "EACHLABS_AUTH_SCHEME": ("basic",),
    "EACHLABS_REQUESTS_PER_MINUTE": ("0", "-1", "many", "1e9"),
    "EACHLABS_MAX_IN_FLIGHT": ("0",),
    "EACHLABS_ACCOUNT": ("a b", "x" * 65),
    "EACHLABS_CLAIM_SECONDS": ("0.5", "nan", "inf"),
    "EACHLABS_SETTLING_SECONDS": ("-1",),
    "EACHLABS_DEADLINE_SECONDS": ("0", "1e9"),
    "EACHLABS_CONDITIONAL_WRITES": ("maybe",),
}


@pytest.mark.parametrize(
    ("variable", "value"), [(name, value) for name, wrong in OUT_OF_BOUNDS.items() for value in wrong]
)
def test_a_value_out_of_its_bounds_is_refused_by_its_variables_name_without_the_value_of_the_key(
    variable: str, value: str
) -> None:
    with pytest.raises(SetupError, match=variable) as refused:
        settings_from_environment({"EACHLABS_API_KEY": KEY, variable: value})
    assert KEY not in str(refused.value)
    assert refused.value.__cause__ is None
    if variable == "EACHLABS_API_KEY":
        assert value not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        *("https://api.eachlabs.ai", "https://proxy.example:8443/eachlabs", "http://127.0.0.1:8700"),
        *("http://127.9.9.9", "http://localhost:1", "http://LOCALHOST", "http://[::1]:8700"),
    ],
)
def test_https_and_loopback_are_where_the_key_may_go(url: str) -> None:
    assert settings_from_environment({"EACHLABS_API_KEY": KEY, "EACHLABS_BASE_URL": url + "/"}).base_url == url


def test_the_key_is_shown_nowhere() -> None:
    settings = AccountSettings(api_key=KEY)  # type: ignore[arg-type]  # pydantic makes a SecretStr of it
    for shown in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert KEY not in shown


def test_settings_are_hashable_and_equal_by_value() -> None:
    one, two = (AccountSettings(api_key=KEY) for _ in range(2))  # type: ignore[arg-type]  # as above
    assert len({one, two}) == 1


@pytest.mark.parametrize("claim_seconds", [1.0, 2.0, 10.0, 60.0, 600.0])
def test_the_times_of_a_purchase_fit_into_the_life_of_its_claim(claim_seconds: float) -> None:
    settings = AccountSettings(api_key=KEY, claim_seconds=claim_seconds)  # type: ignore[arg-type]  # as above
    longest = (
        settings.post_begins_within_seconds + settings.post_given_up_after_seconds + settings.freeze_margin_seconds
    )
    assert longest <= claim_seconds + 1e-9
    if claim_seconds == 60.0:
        assert (settings.post_begins_within_seconds, settings.post_given_up_after_seconds) == (10.0, 30.0)
        assert settings.freeze_margin_seconds == 20.0


def test_an_unknown_field_is_refused() -> None:
    bad: dict[str, Any] = {"api_key": KEY, "api_kye": "x"}
    with pytest.raises(SetupError):
        settings_from_environment({}, **bad)
