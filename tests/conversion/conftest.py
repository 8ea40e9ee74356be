"""What the tests of conversions share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conversion.reporting.page import write_page

WRITES_PAGES = "conversion.reporting.report_files.write_page"


@pytest.fixture(scope="module", autouse=True)
def _without_pages() -> Iterator[None]:
    # Few of the many conversions here are looked at, and drawing takes longer than converting something this small.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WRITES_PAGES, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def with_pages(_without_pages: None) -> Iterator[None]:
    """For tests that look at pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WRITES_PAGES, write_page)
        yield
