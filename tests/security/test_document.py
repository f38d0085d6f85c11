"""What SECURITY.md says is tested where it says."""

from __future__ import annotations

import re

from tests.conftest import ROOT

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_each_promise_is_tested_where_the_document_says() -> None:
    rows = [
        line for line in TEXT.partition("## What is kept from whom")[2].partition("\n## ")[0].splitlines()[2:] if line
    ]
    assert len(rows) > 8
    for row in rows[2:]:
        linked = re.findall(r"\]\((tests/[a-z_/.]+)\)", row)
        assert linked, row
        for path in linked:
            assert (ROOT / path).exists(), path


def test_it_fits_one_screen() -> None:
    assert len(TEXT.splitlines()) <= 60
