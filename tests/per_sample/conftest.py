"""Thousands of tiny calls: waking threads would cost more than it saves."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
