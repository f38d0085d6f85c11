"""`prefect-eachlabs limits`: the limits on tags; the account's own are in tests/limits."""

from __future__ import annotations

import json

import pytest
from prefect.client.orchestration import get_client

from prefect_eachlabs.cli import doctor
from prefect_eachlabs.cli.doctor import State
from prefect_eachlabs.cli.limits import our_tags, problem_of
from prefect_eachlabs.cli.main import main
from prefect_eachlabs.limits.admin import TagLimit
from prefect_eachlabs.settings import settings_from_environment


def test_a_limit_that_cannot_be_meant_is_told_from_an_operators_brake() -> None:
    assert our_tags() >= {"eachlabs", "eachlabs-create", "eachlabs-await", "eachlabs-store", "eachlabs-chunk"}
    for tag, limit, words in (
        ("eachlabs-create", 1, ""),
        ("eachlabs", 5, ""),
        ("eachlabs-craete", 5, "bounds nothing"),
        ("eachlabs-create", 0, "ever begins"),
        ("eachlabs-generate", 1, "batch"),
    ):
        found = problem_of(TagLimit(tag, limit, 0))
        assert words in found
        assert bool(words) == bool(found)


@pytest.mark.usefixtures("prefect_server")
def test_limits_on_tags_are_made_shown_told_by_the_doctor_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EACHLABS_ACCOUNT", "of-tags")

    def tags(*words: str) -> dict[str, tuple[int, bool]]:
        assert main(["limits", *words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["tags"]
        return {one["tag"]: (one["limit"], one["problem"] is not None) for one in told}

    with get_client(sync_client=True) as client:
        client.create_concurrency_limit("of-somebody-else", 1)
    wanted = {"eachlabs-create": (5, False), "eachlabs-craete": (3, True)}
    assert tags("apply", "--tag", "eachlabs-create=5", "--tag", "eachlabs-craete=3") == wanted
    assert tags("show") == wanted
    assert main(["limits", "show"]) == 0
    out = capsys.readouterr().out
    assert "tag eachlabs-craete: 0 of 3 task runs; no task" in out
    assert "tags without a limit: eachlabs, eachlabs-await, " in out
    findings, _ = doctor.limits(settings_from_environment(api_key="none"))
    assert {one.about: one.state for one in findings if one.about.startswith("tag ")} == {
        "tag eachlabs-craete": State.MEND,
        "tag eachlabs-create": State.OK,
    }
    assert tags("apply", "--tag", "eachlabs-create=", "--tag", "eachlabs-craete=") == {}
    assert tags("apply", "--tag", "eachlabs-create=") == {}
