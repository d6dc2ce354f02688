"""Read the data of the next step, and keep its errors until all ranks know them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from d2v2ds.data.loader import StepData, WaitEndedError
from d2v2ds.errors import MachineError, ShardError
from d2v2ds.io.machine_faults import advice


@dataclass(frozen=True)
class Fetched:
    """Data of one step, or the error of reading it."""

    data: StepData | None
    error: Exception | None
    wait_s: float

    def step_data(self) -> StepData:
        """Return the data; there are some unless an error was met by all ranks."""
        assert self.data is not None, self.error
        return self.data


def fetch(data: Iterator[StepData]) -> Fetched:
    """Read the next step's data; return errors, because a rank that raises alone leaves the others waiting."""
    started = time.perf_counter()
    try:
        return Fetched(next(data), None, time.perf_counter() - started)
    except (ShardError, MachineError, WaitEndedError) as error:
        return Fetched(None, error, time.perf_counter() - started)
    except (MemoryError, OSError) as error:
        fault = MachineError(f"data cannot be read: {error!r}; {advice(error) if isinstance(error, OSError) else ''}")
        return Fetched(None, fault, time.perf_counter() - started)
