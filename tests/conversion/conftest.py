"""What the tests of conversions share: what few of them look at is left out of the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conversion.evaluation.continuations import GREEDY_TOKENS
from conversion.reporting.page import write_page

WRITES_PAGES = "conversion.reporting.report_files.write_page"
GOES_ON = "conversion.evaluation.continuations.GREEDY_TOKENS"


@pytest.fixture(scope="module", autouse=True)
def _without_pages_and_continuations() -> Iterator[None]:
    # To draw takes longer than to convert something this small; to go on with texts takes a third of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WRITES_PAGES, lambda *_: None)
        patch.setattr(GOES_ON, 2)
        yield


@pytest.fixture(scope="module")
def with_pages(_without_pages_and_continuations: None) -> Iterator[None]:
    """For tests that look at pages, on which continuations are shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WRITES_PAGES, write_page)
        patch.setattr(GOES_ON, GREEDY_TOKENS)
        yield


@pytest.fixture
def with_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at how source and converted model go on with a text."""
    monkeypatch.setattr(GOES_ON, GREEDY_TOKENS)
