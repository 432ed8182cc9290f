"""What tests of the dispatcher begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dso.fakes import Desk


@pytest.fixture
def held() -> Iterator[Desk]:
    """One executor per bucket; the first batch stays in flight until the lab lets it."""
    desk = Desk(open=False)
    yield desk
    desk.lab.let(True)
