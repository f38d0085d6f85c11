"""JSON of others is read within bounds."""

from __future__ import annotations

import pytest

from prefect_eachlabs.net import safe_json


@pytest.mark.parametrize(
    "text",
    ["[" * 101 + "]" * 101, "[" + "[]," * safe_json.MAX_BRACKETS + "[]]", '["' + "{" * safe_json.MAX_BRACKETS + '"]'],
    ids=["too deep", "too many lists", "too many in a string, which may be opened"],
)
def test_what_would_stop_the_loop_for_long_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested|lists and objects"):
        safe_json.loads(text)


def test_a_long_page_is_read() -> None:
    page = [{"id": str(number), "output": ["https://a.invalid/p.png"], "input": {}} for number in range(10_000)]
    assert safe_json.loads(str(page).replace("'", '"')) == page
