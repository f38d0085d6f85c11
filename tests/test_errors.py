"""The tree of errors: whether to repeat is a fact of the class, and an error keeps its ids wherever it goes."""

from __future__ import annotations

import inspect
import pickle
import re
import textwrap

import pytest

from prefect_eachlabs import errors
from prefect_eachlabs.errors import EachlabsError, without_query

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, EachlabsError)]
KINDS = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

MAY_BE_REPEATED = {"NotSent", "Unanswered", "Throttled", "NotYetSafe", "NotAPng", "DownloadFailed", "StoreFailed"}


def test_the_drawing_at_the_top_is_the_tree() -> None:
    drawing = inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1]
    drawn: dict[str, str | None] = {}
    above: list[str] = []
    for line in textwrap.dedent(drawing).splitlines():
        found = re.match(r"^((?:│   |    |├── |└── )*)(\w+)", line)
        assert found, line
        depth = len(found[1]) // 4
        above = [*above[:depth], found[2]]
        drawn[found[2]] = above[depth - 1] if depth else None
    assert set(drawn) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        parent = drawn[cls.__name__]
        assert parent is None or any(base.__name__ == parent for base in cls.__bases__), cls.__name__


@KINDS
def test_what_may_be_repeated_costs_nothing_to_repeat(cls: type[EachlabsError]) -> None:
    assert cls.retryable is (cls.__name__ in MAY_BE_REPEATED)


@KINDS
def test_an_error_keeps_its_facts_when_it_is_stored_and_read(cls: type[EachlabsError]) -> None:
    error = cls(
        "It went wrong.",
        item_id="fox",
        prediction_id="p-1",
        status_code=500,
        url="https://user:pw@files.invalid/p.png?signature=secret",
        details="d" * 600,
        retry_after_seconds=7.0,
        code="X",
        kind="strange",
    )
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert len(error.details or "") == 500
    assert error.url == "https://files.invalid/p.png"
    for secret in ("secret", "pw@"):
        assert secret not in str(error)
        assert secret.encode() not in pickle.dumps(error)


@KINDS
def test_every_class_says_in_one_sentence_what_it_means(cls: type[EachlabsError]) -> None:
    assert cls.__doc__
    assert cls.__doc__.strip().splitlines()[0].endswith(".")
    assert cls("x").kind == cls.default_kind


def test_ids_are_shown_once() -> None:
    assert str(EachlabsError("Failed.", item_id="fox", prediction_id="p-1")) == "Failed. (item fox, prediction p-1)"
    assert str(EachlabsError("Prediction p-1 failed.", prediction_id="p-1")) == "Prediction p-1 failed."
    assert str(EachlabsError("Failed.")) == "Failed."


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/p.png?X-Amz-Signature=s", "https://h/p.png"),
        ("https://u:p@h:8/p.png#f", "https://h:8/p.png"),
        ("https://h/p.png", "https://h/p.png"),
        ("http://[::1", "(unreadable URL)"),
    ],
)
def test_a_url_is_shown_without_what_is_secret_in_it(url: str, shown: str) -> None:
    assert without_query(url) == shown


def test_a_timed_out_prediction_is_a_time_out_and_a_bad_input_a_value_error() -> None:
    assert issubclass(errors.PredictionTimedOut, TimeoutError)
    assert issubclass(errors.BadInput, ValueError)
    assert issubclass(errors.KeyRefused, errors.SetupError)
