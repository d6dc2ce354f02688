"""Order of the tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole runs first: what takes longest must not begin last when several processes share the files."""
    items.sort(key=lambda item: item.get_closest_marker("run") is None)
