"""Everything that is compared in one golden case."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.verify.bat import check_bat_case, is_bat
from d2v2ds.verify.case import Case, has_trajectory, is_task, model_name
from d2v2ds.verify.data2vec1.step import check_first_case
from d2v2ds.verify.finetuning.check import check_task_case
from d2v2ds.verify.report import Report
from d2v2ds.verify.rivals.mae import check_mae
from d2v2ds.verify.step import check_step
from d2v2ds.verify.tables import TABLES, check_table
from d2v2ds.verify.trajectory import check_trajectory

RIVALS: dict[str, Callable[[Path, str, Report], None]] = {
    "mae": check_mae,
    "data2vec_audio": check_first_case,
    "data2vec_text": check_first_case,
    "data2vec_vision": check_first_case,
    "data2vec_vision_beit_layout": check_first_case,
}
"""Check of a case of another algorithm than data2vec 2.0, by the official name of its model."""


def verify_case(folder: Path, name: str, tolerance: float) -> tuple[Report, str]:
    """Run one case, or one of `tables.tables`.

    Returns:
        The errors, and an empty string or why the case could not be compared.
    """
    report = Report(tolerance)
    try:
        if name in TABLES:
            check_table(folder, name, report)
        elif (of_rival := RIVALS.get(model_name(folder, name))) is not None:
            of_rival(folder, name, report)
        elif is_task(folder, name):
            check_task_case(folder, name, report)
        elif is_bat(folder, name):
            check_bat_case(folder, name, report)
        else:
            case = Case.read(folder, name)
            check_step(case, report)
            if has_trajectory(folder, name):
                check_trajectory(case, folder, report)
    except UnsupportedOptionError as error:
        return report, f"unsupported: {error}"
    except (D2V2Error, SafetensorError, LookupError, ValueError, TypeError, RuntimeError, OSError) as error:
        return report, f"{type(error).__name__}: {error}"
    return report, ""
