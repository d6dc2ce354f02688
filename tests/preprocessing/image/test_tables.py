"""Faults of parquet tables: damaged files told apart from the machine's."""

import errno
from unittest.mock import Mock

import pyarrow as pa
import pytest

from d2v2ds.errors import ConfigError, MachineError
from preprocessing.image.tables import table_faults


def raised(error: BaseException) -> None:
    with table_faults("a.parquet"):
        raise error


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_table_that_the_machine_cannot_read_is_not_damaged(code: int) -> None:
    with pytest.raises(MachineError, match=r"a\.parquet: cannot be read"):
        raised(OSError(code, "text of the system"))


@pytest.mark.parametrize("error", [pa.ArrowInvalid("odd"), OSError("odd"), UnicodeError("odd")])
def test_a_damaged_table_is_named(error: BaseException) -> None:
    with pytest.raises(ConfigError, match="damaged: odd"):
        raised(error)


def test_memory_is_asked_for_by_the_table_or_lacks_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    error = pa.lib.ArrowMemoryError("malloc of size 1 failed")
    with pytest.raises(ConfigError, match="damaged: malloc"):
        raised(error)
    monkeypatch.setattr("mmap.mmap", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    with pytest.raises(MachineError, match=r"a\.parquet: .*no memory left"):
        raised(error)
