"""`FORMAT`: makes `preprocessing.verify` and `preprocessing.inspect` know packed folders of sensors. No torch."""

from preprocessing.driver.protocol import FolderReport
from preprocessing.formats import PackedFormat
from sensors.shards import SensorShards


def _report() -> FolderReport:
    from sensors import report

    return report


FORMAT = PackedFormat(SensorShards, _report)
