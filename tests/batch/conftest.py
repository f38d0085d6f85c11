"""What tests of batches share."""

from __future__ import annotations

import pytest

from prefect_eachlabs.batch import sheet, thumbs
from tests.batch.batch_kit import tiny_png


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails and contact sheets are one pixel: drawing is half the CPU of tests that are about something else."""
    monkeypatch.setattr(thumbs, "thumbnail", lambda *_, **__: tiny_png())
    monkeypatch.setattr(sheet, "thumbnail", lambda *_, **__: tiny_png())
    monkeypatch.setattr(sheet, "contact_sheet", lambda *_: tiny_png())
