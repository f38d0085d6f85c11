"""The scheduled picture: the date it was scheduled for, in the time zone that counts, bought once."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run
from prefect.states import Scheduled

from prefect_eachlabs import StoredImage
from prefect_eachlabs.errors import BadInput, ItemConflict
from prefect_eachlabs.flows.schedule import filled, scheduled_image, zone
from tests.flows.flow_fixtures import Studio

SUNDAY = datetime(2026, 11, 22, 23, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {date:%A} in {date:%B}", "a Sunday in November"),
        ("{date}", "2026-11-22"),
        ("{date:%Y-%m-%d}", "2026-11-22"),
        ("{{date}} {{{date:%H}}}", "{date} {23}"),
        ("100%", "100%"),
        ("{date:day %j, 100%%}", "day 326, 100%"),
        ("{date:%H:%M}", "23:30"),
        ("", ""),
    ],
)
def test_the_date_stands_where_the_template_wants_it(template: str, text: str) -> None:
    assert filled(template, SUNDAY, name="prompt_template") == text


@pytest.mark.parametrize(
    "template",
    [
        *("{date.__class__}", "{date!r}", "{date:>1000000000}{other}", "{0}", "{}", "{dates}", "{date:{date}}"),
        *("{date:%Q}", "{date:%", "{date:%}", "{date:%-d}", "}", "x" * 20_001),
    ],
)
def test_anything_else_in_braces_is_refused_with_what_may_stand_there(template: str) -> None:
    with pytest.raises(BadInput, match=r"prompt_template: .*(write|shorter)"):
        filled(template, SUNDAY, name="prompt_template")


def test_width_is_text_and_not_an_order() -> None:
    """`str.format` would make a gigabyte of blanks."""
    assert len(filled("{date:>1000000000}", SUNDAY, name="prompt_template")) == 11


@given(st.text())
def test_text_with_doubled_braces_comes_back_as_it_was(text: str) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert filled(doubled, SUNDAY, name="prompt_template") == text


@pytest.mark.parametrize("name", ["Europe/Nowhere", "", "../../etc/passwd", "x" * 500, "\0"])
def test_a_time_zone_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="time_zone"):
        zone(name)


@pytest.mark.usefixtures("prefect_server")
class TestTheFlow:
    def fire(self, when: datetime, destination: str, prompt: str = "a {date:%A} fox", **more: str) -> StoredImage:
        """A run that was scheduled for then and starts now, as a worker starts it."""
        parameters = {"prompt_template": prompt, "destination": destination, **more}

        with get_client(sync_client=True) as client:
            state = Scheduled(scheduled_time=when)
            run = client.create_flow_run(scheduled_image, parameters=parameters, state=state)
        image = run_flow(scheduled_image, flow_run=run, parameters=parameters)
        assert isinstance(image, StoredImage)
        return image

    def test_a_run_fired_twice_and_late_buys_once_and_with_another_prompt_nothing(self, studio: Studio) -> None:
        yesterday = datetime.now(timezone.utc) - timedelta(days=1)
        first = self.fire(yesterday, studio.destination)
        second = self.fire(yesterday + timedelta(seconds=1), studio.destination)
        assert (first.item_id, second.reused) == (yesterday.strftime("%Y-%m-%d"), True)
        assert first.prompt == f"a {yesterday:%A} fox"
        with pytest.raises(ItemConflict, match=first.item_id):
            self.fire(yesterday, studio.destination, prompt="a cat")
        assert studio.billed == 1

    def test_the_date_is_that_of_the_time_zone(self, studio: Studio) -> None:
        late = datetime.now(timezone.utc).replace(hour=23, minute=30) - timedelta(days=2)
        image = self.fire(late, studio.destination, time_zone="Asia/Tokyo")
        assert image.item_id == (late + timedelta(hours=9)).strftime("%Y-%m-%d")

    def test_a_run_that_nobody_scheduled_has_the_date_of_today(self, studio: Studio) -> None:
        before = datetime.now(timezone.utc)
        image = scheduled_image("a fox", studio.destination)
        assert image.item_id in {f"{moment:%Y-%m-%d}" for moment in (before, datetime.now(timezone.utc))}
        assert flow_run.scheduled_start_time is not None

    def test_a_wrong_template_buys_nothing(self, studio: Studio) -> None:
        with pytest.raises(BadInput, match="item_id_template"):
            scheduled_image("a fox", studio.destination, item_id_template="{date.year}")
        with pytest.raises(BadInput, match="item"):
            scheduled_image("a fox", studio.destination, item_id_template="{date:%d/%m}")
        assert studio.billed == 0
