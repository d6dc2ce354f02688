"""Checksums are zlib's, whoever computes them."""

import importlib
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from d2v2ds.io import crc


@pytest.fixture(params=["isal", "zlib"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`d2v2ds.io.crc` as it is with ISA-L and without."""
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)  # importing it raises ImportError
    yield importlib.reload(crc)
    monkeypatch.undo()
    importlib.reload(crc)


def test_whole_pieces_and_views_have_zlibs_checksum(module: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for size in [*range(70), 255, 1024, 4095, 65536, 1_000_003]:
        data = rng.integers(0, 256, size, dtype=np.uint8)
        expected = zlib.crc32(data.tobytes())
        assert module.crc32(data.tobytes()) == module.crc32(data) == module.crc32(memoryview(data)) == expected
        cut = size // 3
        assert module.crc32(data[cut:], module.crc32(data[:cut])) == expected
    assert module.crc32(np.arange(-5, 5, dtype=np.int16)) == zlib.crc32(np.arange(-5, 5, dtype=np.int16))


def test_zlib_takes_the_place_of_an_absent_isal(module: ModuleType) -> None:
    is_absent = sys.modules.get("isal.isal_zlib") is None
    assert (module.crc32 is zlib.crc32) == is_absent
