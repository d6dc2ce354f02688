"""Everything that is compared in a folder of golden vectors of fine-tuning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2v2ds.verify.finetuning.case import TaskCase
from d2v2ds.verify.finetuning.decoding import check_decoding
from d2v2ds.verify.finetuning.schedules import check_masks, check_schedules
from d2v2ds.verify.finetuning.scores import check_scores, check_transform
from d2v2ds.verify.finetuning.step import check_task
from d2v2ds.verify.finetuning.trajectory import check_trajectory
from d2v2ds.verify.report import Report


def check_task_case(folder: Path, name: str, report: Report) -> None:
    """Compare one case of a task.

    Raises:
        D2V2Error: it does not fit its network, or has a tensor that nothing is compared with.
    """
    case = TaskCase.read(folder, name)
    if "trajectory" in case.meta:
        check_trajectory(case, report)
    else:
        check_task(case, report)


def _with_json(check: Callable[[Any, Report], None], name: str) -> Callable[[Path, Report], None]:
    return lambda folder, report: check(json.loads((folder / f"{name}.json").read_text()), report)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Path, Report], None]]] = {
    "schedules": (("schedules.json",), _with_json(check_schedules, "schedules")),
    "metrics": (("metrics.json",), _with_json(check_scores, "metrics")),
    "finetune_mask_stats": (("finetune_mask_stats.json",), _with_json(check_masks, "finetune_mask_stats")),
    "eval_transform": (("eval_transform.json", "eval_transform.safetensors"), check_transform),
    "decode": (("decode",), lambda folder, report: check_decoding(folder / "decode", report)),
}
"""Other comparisons: name -> files of which one is enough to ask for it, and the comparison."""
